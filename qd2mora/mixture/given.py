"""Trained LoRAs as the experts of a mixture: read from PEFT's folders, checked, copied into the paired banks.

An expert keeps its own scale: B_e is multiplied by s_e / s, where s is the mixture's. A linear that one of them does
not adapt gets a zero expert there.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qd2mora.disk.untrusted import check_adapter
from qd2mora.errors import InputRefused

if TYPE_CHECKING:
    from qd2mora.mixture.layer import MixtureLinear

# PEFT's own LoRA, and this project's plain one.
_KEYS = {
    "LORA": ("lora_A.weight", "lora_B.weight", "r", "lora_alpha"),
    "QD2MORA": ("mixture_A", "mixture_B", "rank", "alpha"),
}


@dataclass(frozen=True)
class GivenLora:
    """One trained LoRA: its rank, its scale, and A (r, d_in), B (d_out, r) of each linear by the linear's name."""

    folder: Path
    rank: int
    scaling: float
    pairs: dict[str, tuple[Tensor, Tensor]]

    @property
    def targets(self) -> set[str]:
        """Last parts of the names of the linears it adapts."""
        return {name.rpartition(".")[2] for name in self.pairs}


def read_given(folders: list[str], key: str = "adapter.adapters") -> list[GivenLora]:
    """Read adapters; `key` named them. Raises InputRefused where a folder holds none, or none that is a plain LoRA."""
    return [_read(Path(folder), key) for folder in folders]


def load_given(layers: "dict[str, MixtureLinear]", loras: list[GivenLora], adapter_name: str = "default") -> None:
    """Copy trained LoRAs into the banks of adapted linears, expert e from the e-th.

    Raises InputRefused where a LoRA was trained on a linear of another size, or on linears that are not adapted here.
    """
    for lora in loras:
        missing = sorted(set(lora.pairs) - set(layers))
        if missing:
            raise InputRefused(f"adapter.adapters: {lora.folder} adapts {missing[0]}, which is not adapted here")
    for name, layer in layers.items():
        spec, tensors = layer.mixture_spec[adapter_name], layer.tensors(adapter_name)
        downs, ups = [], []
        for lora, rank in zip(loras, spec.step.ranks_down, strict=True):
            nothing = (torch.zeros(rank, layer.in_features), torch.zeros(layer.out_features, rank))
            down, up = lora.pairs.get(name, nothing)
            if down.shape != (rank, layer.in_features) or up.shape != (layer.out_features, rank):
                raise InputRefused(
                    f"adapter.adapters: {lora.folder}: {name} is {up.shape[0]} x {down.shape[1]} there and "
                    f"{layer.out_features} x {layer.in_features} here: another base?"
                )
            downs.append(down)
            ups.append(up * (lora.scaling / spec.scaling))
        is_ragged = tensors["mixture_A"].dim() == 2
        with torch.no_grad():
            tensors["mixture_A"].copy_(torch.cat(downs) if is_ragged else torch.stack(downs))
            tensors["mixture_B"].copy_(torch.cat(ups, -1) if is_ragged else torch.stack(ups))


def _read(folder: Path, key: str) -> GivenLora:
    where = f"{key}: {folder}"
    if (folder / "adapter" / "adapter_config.json").is_file():  # a run of ours
        folder = folder / "adapter"
    check_adapter(folder)
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputRefused(f"{where} holds no adapter that can be read: {str(error).splitlines()[0]}") from error
    kind = settings.get("peft_type")
    if kind not in _KEYS or _is_special(settings):
        raise InputRefused(f"{where} is not a plain LoRA")
    down_key, up_key, rank_key, alpha_key = _KEYS[kind]
    rank, alpha = settings[rank_key], settings[alpha_key]
    stabilized = settings.get("use_rslora") or settings.get("rank_stabilized")
    pairs = {
        _linear_name(key, down_key): (tensor.float().flatten(0, -2), _flat_up(tensors[key.replace(down_key, up_key)]))
        for key, tensor in tensors.items()
        if key.endswith(down_key)
    }
    return GivenLora(folder, rank, alpha / (rank**0.5 if stabilized else rank), pairs)


def _is_special(settings: dict[str, Any]) -> bool:
    """Whether a configuration does more than s B A, or not the same everywhere."""
    if settings["peft_type"] == "QD2MORA":
        return settings.get("method") != "lora" or bool(settings.get("shared"))
    keys = ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "use_qalora", "target_parameters")
    return any(settings.get(key) for key in keys)


def _linear_name(key: str, suffix: str) -> str:
    return re.sub(r"^base_model\.model\.", "", key.removesuffix("." + suffix))


def _flat_up(tensor: Tensor) -> Tensor:
    return tensor.float()[0] if tensor.dim() == 3 else tensor.float()


__all__ = ["GivenLora", "load_given", "read_given"]
