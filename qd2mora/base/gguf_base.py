"""A GGUF file as a base: its configuration, its weights under transformers' names, its tokenizer.

Weights are dequantised by the `gguf` package tensor by tensor (rows by rows where they are asked for so), on their way
into NF4: the 16-bit model is never in memory. transformers' own way (5.24) dequantises all of a file at once, and
leaves out what a file says of head widths, soft caps and scaled positions.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from qd2mora.base.files import UNLOADABLE, first_line
from qd2mora.base.gguf_forms import ARCHES, FORMS, KEYS, GgufForm, fixed_fields, llama3_rope
from qd2mora.base.gguf_tokens import tokenizer_of
from qd2mora.disk.gguf_header import GgufHeader, TensorPlace, gguf_package, read_header
from qd2mora.disk.model_config import check_model_config
from qd2mora.errors import DamagedFile, InputRefused

_READ_AT_ONCE = 1 << 20
"""Numbers dequantised at once: the package takes several times their bytes, and several tensors load side by side."""
_FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
_POSITIONS = "rope_freqs.weight"


def header_of(model: str) -> GgufHeader:
    """Return a file's header, read once while the file stays as it is. Raises InputRefused, DamagedFile."""
    path = Path(model)
    if not path.is_file():
        raise InputRefused(f"base.model: no file '{model}'")
    state = path.stat()
    return _header_in_state(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4)
def _header_in_state(path: Path, *state: int) -> GgufHeader:
    return read_header(path)


def gguf_config(model: str) -> PreTrainedConfig:
    """Return the configuration that a file says. Raises InputRefused where it is of no known family."""
    header = header_of(model)
    kind, form = _family_of(header, model)
    values = _fields(header, form, model)
    check_model_config(values, Path(model))  # a billion layers would be built before the weights are looked at
    try:
        config = AutoConfig.for_model(kind, **values)
        for name, value in fixed_fields(config).items():
            setattr(config, name, value)
    except UNLOADABLE as error:
        raise InputRefused(f"base.model: '{model}' says sizes that no {kind} has: {first_line(error)}") from error
    return config


def _family_of(header: GgufHeader, model: str) -> tuple[str, GgufForm]:
    arch = header.content.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHES:
        raise InputRefused(
            f"base.model: '{model}' is of the architecture {str(arch)[:40]!r}; known are {', '.join(sorted(ARCHES))}"
        )
    if header.content.get("general.type", "model") != "model":
        raise InputRefused(f"base.model: '{model}' is a {header.content['general.type']!r} and not a model")
    kind = ARCHES[arch]
    return kind, FORMS[kind]


def _fields(header: GgufHeader, form: GgufForm, model: str) -> dict[str, Any]:
    """Return what the configuration of a family takes, from a file's keys and the shapes of its tensors."""
    content, places = header.content, header.tensors
    fields: dict[str, Any] = {}
    for name, key in (KEYS | dict(form.keys)).items():
        value = content.get(f"{form.arch}.{key}")
        # Left out where every head has keys of its own: llama.cpp then takes the number of heads.
        if value is None and key == "attention.head_count_kv":
            value = fields["num_attention_heads"]
        if isinstance(value, list) and len(set(value)) == 1:  # one number for each layer
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1 << 31:
            raise InputRefused(f"base.model: '{model}': {form.arch}.{key} is {str(value)[:60]}")
        fields[name] = value
    if "token_embd.weight" not in places:
        raise InputRefused(f"base.model: '{model}' is not whole: no token_embd.weight")
    heads, head_dim = fields["num_attention_heads"], content.get(f"{form.arch}.attention.key_length")
    if head_dim is None:
        head_dim = fields["hidden_size"] // heads
    fields |= {"head_dim": head_dim, "vocab_size": places["token_embd.weight"].shape[0]}
    # No key tells: llama.cpp takes the embedding where a file has no output matrix.
    fields["tie_word_embeddings"] = "output.weight" not in places
    # No key tells of biases either; the first layer shows them.
    if form.arch in ("llama", "granite"):
        fields["attention_bias"] = "blk.0.attn_q.bias" in places
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        fields[f"{name}_token_id"] = content.get(f"tokenizer.ggml.{key}_token_id")
    fields["rope_parameters"] = _rope(header, form, head_dim, model)
    return fields


def _rope(header: GgufHeader, form: GgufForm, head_dim: int, model: str) -> dict[str, Any]:
    content = header.content
    theta = float(content.get(f"{form.arch}.rope.freq_base", 10_000.0))
    scaling, factor = content.get(f"{form.arch}.rope.scaling.type"), content.get(f"{form.arch}.rope.scaling.factor")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaling not in (None, "none", "linear") or "rope_factors_long.weight" in header.tensors:
        raise InputRefused(f"base.model: '{model}': position scaling '{scaling}' is not read; name the model's folder")
    if scaling == "linear":
        rope = {"rope_type": "linear", "rope_theta": theta, "factor": float(factor or 1.0)}
    if _POSITIONS in header.tensors:
        factors = StoredBlocks(header.tensors[_POSITIONS]).read()
        found = llama3_rope(factors, theta, head_dim)
        if found is None:
            raise InputRefused(f"base.model: '{model}': its rope_freqs are of no kind that is known; name its folder")
        rope = found
    width = content.get(f"{form.arch}.rope.dimension_count", head_dim)
    if width != head_dim:
        rope["partial_rotary_factor"] = width / head_dim
    if form.arch == "gemma3":
        return {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
    return rope


def gguf_generation(model: str) -> GenerationConfig:
    """Return how texts are continued: what a file says ends them. Raises InputRefused, DamagedFile."""
    content = header_of(model).content
    ends = [content.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    known = list(dict.fromkeys(end for end in ends if isinstance(end, int)))
    return GenerationConfig(
        bos_token_id=content.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=known or None,
        pad_token_id=content.get("tokenizer.ggml.padding_token_id"),
    )


@dataclass(frozen=True)
class StoredBlocks:
    """A tensor in a file, dequantised when it is asked for; what `StoredTensor` is for safetensors.

    `heads`: rows lie in pairs within each of so many heads, and come back in halves. `offset` is taken off.
    """

    place: TensorPlace
    heads: int | None = None
    offset: float = 0.0

    @property
    def path(self) -> Path:
        return self.place.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.place.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that comes out: the file's own where it holds plain numbers, else float16."""
        # Scales in a block are float16, so that its rounding is a thousandth of a step of the finest kind; in float32
        # the embedding of a vocabulary of 128,256 would stand there with 2.1 GB at once.
        return _FLOATS.get(self.place.kind, torch.float16)

    def get_shape(self) -> list[int]:
        """Return its shape."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """Return its dtype as safetensors names it."""
        return {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[self.dtype]

    def __getitem__(self, index: Any) -> Tensor:
        return self.read()[index]

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        """Return rows `first` to `last`, fresh. Raises OSError, DamagedFile."""
        last = self.shape[0] if last is None else last
        if self.heads is None:
            rows = self._stored(first, last)
        else:
            # Pairs are put back within whole heads; the rows that are asked for are cut out of those.
            size = self.shape[0] // self.heads
            start, stop = first // size * size, -(-last // size) * size
            pairs = self._stored(start, stop).unflatten(0, (-1, size // 2, 2))
            rows = pairs.transpose(1, 2).flatten(0, 2)[first - start : last - start].contiguous()
        if self.offset:
            rows -= self.offset
        return rows

    def _stored(self, first: int, last: int) -> Tensor:
        """Return rows as they stand in the file, dequantised a part at a time."""
        gguf, place = gguf_package(), self.place
        numbers, num_bytes = gguf.GGML_QUANT_SIZES[place.kind]
        of_row, shape = math.prod(place.shape[1:]), (last - first, *place.shape[1:])
        if len(place.shape) == 1:  # a vector is one row
            of_row, first, last, shape = place.shape[0], 0, 1, place.shape
        row_bytes = of_row // numbers * num_bytes
        out = torch.empty((last - first, of_row), dtype=self.dtype)
        step = max(1, _READ_AT_ONCE // of_row)
        with place.path.open("rb") as file:
            file.seek(place.start + first * row_bytes)
            for start in range(0, last - first, step):
                count = min(step, last - first - start)
                content = file.read(count * row_bytes)
                if len(content) != count * row_bytes:
                    raise DamagedFile(f"{place.path} is cut short")
                packed = np.frombuffer(content, np.uint8).reshape(count, row_bytes)
                if place.kind in _FLOATS:
                    # A copy: what was read is read-only memory, which a tensor would let be written.
                    out[start : start + count] = torch.from_numpy(packed.copy()).view(self.dtype)
                else:
                    kind = gguf.GGMLQuantizationType(place.kind)
                    out[start : start + count] = torch.from_numpy(gguf.quants.dequantize(packed, kind))
        return out.view(shape)


def gguf_tensors(model: str) -> dict[str, StoredBlocks]:
    """Return the weights by transformers' names. Raises InputRefused, DamagedFile."""
    header, config = header_of(model), gguf_config(model)
    form = FORMS[config.model_type]
    # By the package's table turned over, so that reading and writing cannot differ in a name.
    names = {theirs: ours for ours, theirs in gguf_names(config).items()}
    found: dict[str, StoredBlocks] = {}
    for name, place in header.tensors.items():
        if name == _POSITIONS:
            continue
        if name not in names:
            raise InputRefused(f"base.model: '{model}' holds {name}, which a {config.model_type} has no place for")
        ours = names[name]
        offset = 1.0 if form.adds_one and ours.endswith("norm.weight") else 0.0
        found[ours] = StoredBlocks(place, heads_of(ours, config), offset)
    return found


def gguf_names(config: PreTrainedConfig) -> dict[str, str]:
    """Return llama.cpp's name of each weight of a model by ours, from the package's own table of names."""
    gguf = gguf_package()
    arch = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == FORMS[config.model_type].arch)
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    # A tied head too: an adapter may have untied it.
    ours = {*(name for name, _ in model.named_parameters()), "lm_head.weight"}
    found = {}
    for name in ours:
        theirs = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is not None:
            found[name] = theirs
    return found


def heads_of(name: str, config: PreTrainedConfig) -> int | None:
    """Return how many heads the rows of a weight, or of its linear, are reordered in; None where they are not."""
    if not FORMS[config.model_type].rotates_pairs:
        return None
    linear = name.removesuffix(".weight").removesuffix(".bias")
    if linear.endswith(".q_proj"):
        return int(config.num_attention_heads)
    if linear.endswith(".k_proj"):
        return int(config.num_key_value_heads)
    return None


def gguf_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a file holds. Raises InputRefused."""
    return tokenizer_of(header_of(model).content, Path(model))


__all__ = [
    "StoredBlocks",
    "gguf_config",
    "gguf_generation",
    "gguf_names",
    "gguf_tensors",
    "gguf_tokenizer",
    "header_of",
    "heads_of",
]
