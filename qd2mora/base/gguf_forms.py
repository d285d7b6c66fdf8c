"""What llama.cpp's file format says of a family, both ways: one row each, read by the base and written by exports.

A row pairs transformers' fields with llama.cpp's keys. What llama.cpp's own code has fixed and no key tells (a window
every other layer, the scale of attention) is checked when a file is written and set when one is read. Sources:
`convert_hf_to_gguf.py` and `src/llama-model.cpp` of llama.cpp (September 2025), one class of each a family.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from qd2mora.errors import InputRefused

KEYS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
"""Fields that every family has, and llama.cpp's names for them."""


@dataclass(frozen=True)
class GgufForm:
    """A family in llama.cpp: its name there, its own keys, and how its tensors lie.

    `rotates_pairs`: rows of q and k are reordered within each head, because its code rotates neighbouring pairs where
    transformers rotates halves. `adds_one`: norms' weights stand there with the one that Gemma adds when it runs.
    """

    arch: str
    keys: Mapping[str, str] = field(default_factory=dict)
    rotates_pairs: bool = False
    adds_one: bool = False
    ignores_window: bool = False
    """llama.cpp attends to everything; a file's context ends where the window does, so that both are the same."""


FORMS = {
    "llama": GgufForm("llama", rotates_pairs=True),
    "mistral": GgufForm("llama", rotates_pairs=True, ignores_window=True),
    "qwen2": GgufForm("qwen2"),
    "qwen3": GgufForm("qwen3"),
    "gemma2": GgufForm(
        "gemma2",
        {
            "sliding_window": "attention.sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        adds_one=True,
    ),
    "gemma3_text": GgufForm("gemma3", {"sliding_window": "attention.sliding_window"}, adds_one=True),
    "phi3": GgufForm("phi3", ignores_window=True),
    "smollm3": GgufForm("smollm3", rotates_pairs=True),
    "olmo2": GgufForm("olmo2"),
    "granite": GgufForm(
        "granite",
        {
            "attention_multiplier": "attention.scale",
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        },
        rotates_pairs=True,
    ),
}
"""By transformers' `model_type`. Files of `llama` are read as LLaMA: a Mistral without its window is one."""
ARCHES = {form.arch: kind for kind, form in FORMS.items() if kind != "mistral"}
"""The family that a file of an architecture is read as."""

_GEMMA3_WINDOWED_THETA = 10_000.0


def head_dim_of(config: PreTrainedConfig) -> int:
    """Return the width of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def fixed_fields(config: PreTrainedConfig) -> dict[str, object]:
    """Return the fields that llama.cpp's code has fixed for a family, as they must be for a file to be right."""
    layers, head, heads = config.num_hidden_layers, head_dim_of(config), config.num_attention_heads
    kind = config.model_type
    if kind == "gemma2":
        # The 27B alone, told by its number of layers, scales by the width a head would have in the states.
        scalar = config.hidden_size // heads if layers == 46 else head
        windows = ["full_attention" if place % 2 else "sliding_attention" for place in range(layers)]
        return {"query_pre_attn_scalar": scalar, "layer_types": windows, "hidden_activation": "gelu_pytorch_tanh"}
    if kind == "gemma3_text":
        scalar = config.hidden_size // heads if layers == 62 else head
        windows = ["sliding_attention" if (place + 1) % 6 else "full_attention" for place in range(layers)]
        return {
            "query_pre_attn_scalar": scalar,
            "layer_types": windows,
            "hidden_activation": "gelu_pytorch_tanh",
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        }
    if kind == "smollm3":
        return {"no_rope_layers": [int((place + 1) % 4 != 0) for place in range(layers)], "hidden_act": "silu"}
    return {"hidden_act": "silu"}


def check_fixed(config: PreTrainedConfig, what: str) -> None:
    """Refuse a model that llama.cpp would run otherwise. Raises InputRefused."""
    for name, value in fixed_fields(config).items():
        found = getattr(config, name)
        if found != value:
            raise InputRefused(
                f"{what}: llama.cpp takes {name} of a {config.model_type} to be {str(value)[:60]}, here it is "
                f"{str(found)[:60]}; --to hf keeps it"
            )
    if config.model_type == "qwen2" and "sliding_attention" in (config.layer_types or ()):
        raise InputRefused(f"{what}: llama.cpp has no sliding window for qwen2; --to hf keeps it")
    rope = rope_of(config)
    if rope["rope_type"] not in ("default", "linear") and (config.model_type, rope["rope_type"]) != ("llama", "llama3"):
        raise InputRefused(f"{what}: position scaling '{rope['rope_type']}' is not written; --to hf will do")
    if config.model_type == "gemma3_text":
        theta = config.rope_parameters["sliding_attention"]["rope_theta"]
        if theta != _GEMMA3_WINDOWED_THETA:
            raise InputRefused(
                f"{what}: llama.cpp turns a Gemma 3's windows by {_GEMMA3_WINDOWED_THETA:g}, not {theta}"
            )


def rope_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Return how positions turn heads: of a model with windows, in its other layers."""
    rope = dict(config.rope_parameters)
    if "full_attention" in rope:
        rope = dict(rope["full_attention"])
    return rope


def context_length(config: PreTrainedConfig) -> int:
    """Return the context that a file may promise."""
    window = getattr(config, "sliding_window", None)
    if FORMS[config.model_type].ignores_window and window is not None:
        return int(min(config.max_position_embeddings, window))
    return int(config.max_position_embeddings)


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """Return what llama.cpp divides each frequency by, (head_dim / 2,): 1 for short waves, more for long ones.

    As in transformers' `_compute_llama3_parameters` (5.24), in float64, rounded to the float32 of the file.
    """
    half = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    waves = 2 * math.pi * float(rope["rope_theta"]) ** half
    factor, length = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    # Waves that fit the old context often stay as they are, those longer than it stretch by the whole factor, and
    # between the two the frequencies mix. A file holds divisors of frequencies, hence one over.
    smooth = ((length / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def llama3_rope(factors: torch.Tensor, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Return the scaling that gives these factors; None where it is none of LLaMA 3's kind.

    A file holds the factors alone. LLaMA 3's kind has the greatest for its factor, frequencies 1 and 4, and a length
    that is a power of two: each is tried, and taken where every factor comes out to float32.
    """
    for exponent in range(4, 24):
        rope = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1 << exponent,
        }
        # The whole vector has to come out: one factor alone fits several lengths.
        if torch.allclose(llama3_factors(rope, head_dim), factors, rtol=1e-4, atol=0):
            return rope
    return None


__all__ = [
    "ARCHES",
    "FORMS",
    "KEYS",
    "GgufForm",
    "check_fixed",
    "context_length",
    "fixed_fields",
    "head_dim_of",
    "llama3_factors",
    "llama3_rope",
    "rope_of",
]
