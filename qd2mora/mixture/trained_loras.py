"""Trained LoRAs that become the experts of a mixture: read from PEFT's folders, and checked."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qd2mora.disk.sealed import verify_where_ours
from qd2mora.disk.untrusted import check_adapter
from qd2mora.errors import InputRefused

# PEFT's own LoRA, and this project's plain one.
_KEYS = {
    "LORA": ("lora_A.weight", "lora_B.weight", "r", "lora_alpha"),
    "QD2MORA": ("mixture_A", "mixture_B", "rank", "alpha"),
}


@dataclass(frozen=True)
class TrainedLora:
    """One trained LoRA: its rank, its scale, and A (r, d_in), B (d_out, r) of each linear by the linear's name."""

    folder: Path
    rank: int
    scaling: float
    pairs: dict[str, tuple[Tensor, Tensor]]

    @property
    def targets(self) -> set[str]:
        """Last parts of the names of the linears it adapts."""
        return {name.rpartition(".")[2] for name in self.pairs}


def find_adapter(folder: Path) -> Path | None:
    """Return where an adapter lies: a run's `adapter`, or the folder itself; None where there is none."""
    for place in (folder / "adapter", folder):
        if (place / "adapter_config.json").is_file():
            return place
    return None


def read_trained_loras(folders: list[str], key: str = "adapter.adapters") -> list[TrainedLora]:
    """Read adapters; `key` named them. Raises InputRefused where a folder holds none, or none that is a plain LoRA."""
    return [_read_lora(Path(folder), key) for folder in folders]


def _read_lora(folder: Path, key: str) -> TrainedLora:
    where = f"{key}: {folder}"
    folder = find_adapter(folder) or folder
    # Folders come from anywhere: their bytes are checked before a library reads them.
    verify_where_ours(folder)
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
    rank, alpha = settings.get(rank_key), settings.get(alpha_key)
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise InputRefused(f"{where}: adapter_config.json gives no {rank_key} and {alpha_key}")
    divisor = rank
    if settings.get("use_rslora") or settings.get("rank_stabilized"):
        divisor = rank**0.5
    pairs = {}
    for key, tensor in tensors.items():
        if not key.endswith(down_key):
            continue
        up = tensors.get(key.replace(down_key, up_key))
        if up is None or min(up.dim(), tensor.dim()) < 2 or tensor.shape[-2] != rank or up.shape[-1] != rank:
            raise InputRefused(f"{where}: '{key}' has no partner, or is not of the rank {rank} that its config gives")
        pairs[_linear_name(key, down_key)] = (tensor.float().flatten(0, -2), _flat_up(up))
    return TrainedLora(folder, rank, alpha / divisor, pairs)


def _is_special(settings: Mapping[str, object]) -> bool:
    """Whether a configuration does more than s B A, or not the same everywhere."""
    if settings["peft_type"] == "QD2MORA":
        return settings.get("method") != "lora" or bool(settings.get("shared"))
    # Each changes the formula or a rank somewhere: read as s B A it would be another function, without an error.
    keys = ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "use_qalora", "target_parameters")
    return any(settings.get(key) for key in keys)


def _linear_name(key: str, suffix: str) -> str:
    return re.sub(r"^base_model\.model\.", "", key.removesuffix("." + suffix))


def _flat_up(tensor: Tensor) -> Tensor:
    """Return B (d_out, r); ours has an axis of one expert before it."""
    return tensor.float().reshape(tensor.shape[-2:])


__all__ = ["TrainedLora", "find_adapter", "read_trained_loras"]
