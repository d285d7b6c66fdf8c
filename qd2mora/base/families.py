"""The families of models that are known: what each does otherwise than LLaMA, one row each.

What stands here is what code outside transformers must know of a family: the formula of its norms (`memory/lean.py`),
how linears are fused, and what of it llama.cpp's file format says (`gguf_forms.py`). The rest, attention and all, is
transformers' own code. A family that is not here is refused by name: an unknown norm or a scaled logit would train
something else without a word.
"""

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedConfig

from qd2mora.errors import InputRefused

NormForm = Literal["rounded first", "weighed first", "one more than its weight"]
"""w round(n), as LLaMA has it; round(w n); round((1 + w) n). n: the normed numbers, in float32."""


@dataclass(frozen=True)
class Family:
    """One family: transformers' `model_type` and the prefix of its classes, and what is not as in LLaMA."""

    model_type: str
    prefix: str
    norm: NormForm = "rounded first"
    fuses_projections: bool = False
    """q, k and v are one linear, and gate and up are."""
    folder: str = ""
    """Where transformers keeps its code, if not under `model_type`."""

    @property
    def module(self) -> str:
        """transformers' module of the family's classes."""
        folder = self.folder or self.model_type
        return f"transformers.models.{folder}.modeling_{folder}"


FAMILIES = (
    Family("llama", "Llama"),  # Llama 2, 3, 3.1, 3.2, SmolLM2, TinyLlama
    Family("mistral", "Mistral"),
    Family("qwen2", "Qwen2"),
    Family("qwen3", "Qwen3"),
    Family("gemma2", "Gemma2", norm="one more than its weight"),
    Family("gemma3_text", "Gemma3", norm="one more than its weight", folder="gemma3"),
    Family("phi3", "Phi3", fuses_projections=True),  # Phi 3, 3.5, 4
    Family("smollm3", "SmolLM3"),
    Family("olmo2", "Olmo2", norm="weighed first"),
    Family("granite", "Granite"),
)
_BY_TYPE = {family.model_type: family for family in FAMILIES}

# What comes near and is not the same: a line that says so is worth more than a list of what is known.
_NEAR = {
    "gemma3": "a Gemma 3 that sees; export its text model (Gemma3ForCausalLM), or take the 1B, which only reads",
    "mixtral": "a mixture of experts already",
    "qwen2_moe": "a mixture of experts already",
    "qwen3_moe": "a mixture of experts already",
}


def family_of(config: PreTrainedConfig, name: str) -> Family:
    """Return the family of a model called `name`. Raises InputRefused where it is none that is known."""
    kind = config.model_type
    if kind in _BY_TYPE:
        return _BY_TYPE[kind]
    known = ", ".join(family.model_type for family in FAMILIES)
    near = f", {_NEAR[kind]}" if kind in _NEAR else ""
    raise InputRefused(f"base.model: '{name}' is a {kind}{near}; families that are known: {known}")


__all__ = ["FAMILIES", "Family", "NormForm", "family_of"]
