"""A saved adapter that a run starts from: what it is, and its tensors; a run's, an adapter's folder, or a PEFT LoRA.

What `compose` makes is an adapter's folder too. The bytes of a sealed one are verified before they are read.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qd2mora.disk.sealed import verify_where_ours
from qd2mora.disk.untrusted import check_adapter
from qd2mora.errors import InputRefused
from qd2mora.mixture.registration import MODEL_PREFIX
from qd2mora.mixture.trained_loras import find_adapter, read_trained_loras

KEY = "adapter.start"
OF_A_RUN = {"dropout", "dropout_per_expert", "penalty", "penalties"}
"""Keys that a run may change of the adapter it goes on from: they are in none of its tensors."""
_OF_PEFT = {each.name for each in fields(PeftConfig)} | {"peft_type", "inference_mode"}


def start_folder(start: str) -> Path:
    """Return where the adapter lies: the folder itself, or a run's `adapter`. Raises InputRefused, DamagedFile."""
    folder = find_adapter(Path(start))
    if folder is None:
        raise InputRefused(f"{KEY}: '{start}' holds no adapter; name a run, an adapter's folder or a PEFT LoRA's")
    verify_where_ours(folder)
    check_adapter(folder)
    return folder


def start_settings(start: str) -> dict[str, Any]:
    """Return the fields of the adapter's configuration that say what it computes. Raises InputRefused, DamagedFile."""
    folder = start_folder(start)
    content: Mapping[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if content["peft_type"] == "QD2MORA":
        kept = {key: value for key, value in content.items() if key not in _OF_PEFT and value is not None}
        return {key: value for key, value in kept.items() if key not in ("peft_version", "auto_mapping")}
    (lora,) = read_trained_loras([start], KEY)
    # One scale for s B A: what rank-stabilised LoRAs divide by is in it.
    return {
        "method": "lora",
        "rank": lora.rank,
        "alpha": lora.scaling * lora.rank,
        "target_modules": content.get("target_modules") or sorted(lora.targets),
        "exclude_modules": content.get("exclude_modules"),
        "layers_to_transform": content.get("layers_to_transform"),
    }


def start_tensors(start: str) -> dict[str, Tensor]:
    """Return the adapter's tensors, by linear and name of the tensor. Raises InputRefused, DamagedFile."""
    folder = start_folder(start)
    try:
        stored = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputRefused(f"{KEY}: '{start}' cannot be read: {str(error).splitlines()[0]}") from error
    if any(".lora_A." in key for key in stored):
        (lora,) = read_trained_loras([start], KEY)
        pairs = lora.pairs.items()
        downs = {f"{name}.mixture_A": down for name, (down, _) in pairs}
        return downs | {f"{name}.mixture_B": up for name, (_, up) in pairs}
    return {key.removeprefix(MODEL_PREFIX): tensor for key, tensor in stored.items()}


def alike(one: object, other: object) -> bool:
    """Compare settings, lists of names whatever their order."""
    if isinstance(one, list | set) and isinstance(other, list | set):
        return sorted(map(str, one)) == sorted(map(str, other))
    return one == other


__all__ = ["KEY", "OF_A_RUN", "alike", "start_folder", "start_settings", "start_tensors"]
