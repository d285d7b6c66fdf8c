"""A plain Hugging Face folder in float16, written weight by weight.

Each 4-bit weight is dequantised, the update added in float32, rounded to float16 and put into the shard at hand; a full
shard goes to disk before the next begins, so that the peak is one shard and one weight, never the model.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qd2mora.base import dense_weight
from qd2mora.errors import NotFinite

SHARD_BYTES = 1 << 30


@dataclass
class Written:
    """What the writer did: files, bytes, and the rounding to float16 relative to each update."""

    files: list[str] = field(default_factory=list)
    num_bytes: int = 0
    rounding: dict[str, float] = field(default_factory=dict)


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    update: Callable[[str], Tensor | None],
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
) -> Written:
    """Write `model`'s weights, each linear with `update(name)` (d_out, d_in) float32 added, into an existing folder.

    `model` is the base with or without adapters in it; names in the files are the base's own. Raises NotFinite where a
    weight does not fit float16.
    """
    written = Written()
    names = list(_shard_names(model, shard_bytes))
    index = {name: shard for name, shard, _ in names}
    pending: dict[str, Tensor] = {}
    for position, (name, shard, parameter_owner) in enumerate(names):
        pending[name] = _half(name, parameter_owner, update, written)
        if position + 1 == len(names) or names[position + 1][1] != shard:
            save_file(pending, folder / shard, metadata={"format": "pt"})
            written.num_bytes += sum(tensor.nbytes for tensor in pending.values())
            written.files.append(shard)
            pending = {}
    if len(written.files) > 1:
        content = {"metadata": {"total_size": written.num_bytes}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    _write_config(model, folder)
    tokenizer.save_pretrained(folder)
    return written


@dataclass(frozen=True)
class _Owner:
    """The module that holds a parameter, and the parameter's own name there."""

    module: nn.Module
    attribute: str
    name: str


def _parameters(model: PreTrainedModel) -> Iterator[tuple[str, _Owner, int]]:
    """Yield checkpoint name, owner and number of entries; adapters skipped, tied weights once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or "mixture_" in path or "lora_" in path:
                continue
            seen.add(id(parameter))
            plain = path.removesuffix(".base_layer")
            is_linear = isinstance(module, nn.Linear) and attribute == "weight"
            entries = module.in_features * module.out_features if is_linear else parameter.numel()
            yield f"{plain}.{attribute}", _Owner(module, attribute, plain), entries


def _shard_names(model: PreTrainedModel, shard_bytes: int) -> Iterator[tuple[str, str, _Owner]]:
    groups: list[list[tuple[str, _Owner]]] = [[]]
    size = 0
    for name, owner, entries in _parameters(model):
        if size and size + 2 * entries > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append((name, owner))
        size += 2 * entries
    for number, group in enumerate(groups, 1):
        alone = len(groups) == 1
        shard = "model.safetensors" if alone else f"model-{number:05}-of-{len(groups):05}.safetensors"
        for name, owner in group:
            yield name, shard, owner


def _half(name: str, owner: _Owner, update: Callable[[str], Tensor | None], written: Written) -> Tensor:
    if isinstance(owner.module, nn.Linear) and owner.attribute == "weight":
        value = dense_weight(owner.module).cpu()
        delta = update(owner.name)
        if delta is not None:
            value += delta.cpu()
    else:
        value, delta = getattr(owner.module, owner.attribute).detach().float().cpu(), None
    half = value.to(torch.float16)
    if not torch.isfinite(half).all():
        raise NotFinite(f"{name}: a merged weight of {float(value.abs().max()):g} does not fit float16")
    if delta is not None:
        size = float(delta.norm())
        written.rounding[owner.name] = float((half.float() - value).norm()) / size if size else 0.0
    return half.contiguous()


def _write_config(model: PreTrainedModel, folder: Path) -> None:
    content = model.config.to_dict()
    for key in ("quantization_config", "_pre_quantization_dtype", "_name_or_path", "torch_dtype"):
        content.pop(key, None)
    content["dtype"] = "float16"
    content["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


__all__ = ["SHARD_BYTES", "Written", "write_model"]
