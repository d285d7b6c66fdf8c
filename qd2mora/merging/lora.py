"""The plain LoRA export: PEFT's own folder, for anything that loads a LoRA (PEFT, vLLM, llama.cpp's converter).

A static update is s B A already, so it is stored as it is, without an SVD. All linears get the widest rank, narrower
ones padded with zero ranks, because some loaders know one rank alone; alpha is that rank and s is folded into B.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from qd2mora.base.device import FLOATS
from qd2mora.base.tokenizer import save_tokenizer
from qd2mora.disk.durable import write_file
from qd2mora.disk.file_hash import SizeAndHash
from qd2mora.disk.tensor_file import tensor_at_hand, write_tensors
from qd2mora.errors import InputRefused, NotFinite
from qd2mora.merging.base_weights import BaseWeights
from qd2mora.merging.rung import ExportForm, Rung, WriteFolder, Written
from qd2mora.merging.static_updates import Statics
from qd2mora.mixture.low_rank import LowRank
from qd2mora.mixture.registration import MODEL_PREFIX
from qd2mora.run_folder import OpenRun

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_lora(
    statics: Mapping[str, LowRank],
    base: str,
    linears: Iterable[str] | None,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
) -> dict[str, SizeAndHash]:
    """Write a PEFT LoRA folder for a base that has these `linears` (None: targets by whole names).

    Raises InputRefused where an update is more than a LoRA, NotFinite where a number does not fit the dtype.
    """
    rank, factors = factors_of(statics, "--to lora", dtype)
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in factors.items():
        tensors[f"{MODEL_PREFIX}{name}.lora_A.weight"] = down
        tensors[f"{MODEL_PREFIX}{name}.lora_B.weight"] = up
    targets = sorted(statics)
    if linears is not None:
        targets = targets_of(statics, linears)
    text = json.dumps(_config(targets, base, rank), indent=1, sort_keys=True) + "\n"
    return {
        WEIGHTS: write_tensors(folder / WEIGHTS, [tensor_at_hand(*each) for each in tensors.items()]),
        CONFIG: write_file(folder / CONFIG, [text.encode()]),
    }


def factors_of(
    statics: Mapping[str, LowRank], where: str, dtype: torch.dtype
) -> tuple[int, dict[str, tuple[Tensor, Tensor]]]:
    """Return the rank and A (rank, d_in), B (d_out, rank) of every update, scale 1, in a dtype on the CPU.

    Raises InputRefused where an update is more than a LoRA, NotFinite.
    """
    if not statics:
        raise InputRefused(f"{where}: this method changes no linear by a LoRA; --to hf writes dense weights")
    scaled = [name for name, static in statics.items() if static.base_change]
    if scaled:
        raise InputRefused(f"{where}: {scaled[0]} scales its base too, which no LoRA can; --to hf writes dense weights")
    # Rows and columns of zeros add nothing, whatever the rank says.
    rank = max(static.rank for static in statics.values())
    factors = {}
    for name, static in statics.items():
        pad = rank - static.rank
        # s goes into B in float32, before the one rounding to the file's dtype; alpha = r then leaves a loader's own
        # scale at 1.
        down, up = static.down.float().cpu(), static.scaling * static.up.float().cpu()
        factors[name] = F.pad(down, (0, 0, 0, pad)).to(dtype), F.pad(up, (0, pad)).to(dtype)
        if not all(factor.isfinite().all() for factor in factors[name]):
            kind = str(dtype).removeprefix("torch.")
            raise NotFinite(f"{name}: a number does not fit {kind}; --dtype float32 holds it")
    return rank, factors


def targets_of(adapted: Iterable[str], linears: Iterable[str]) -> list[str]:
    """Return the last parts of names (what loaders expect) where they pick just the adapted linears, else all names."""
    wanted = set(adapted)
    kinds = {name.rpartition(".")[2] for name in wanted}
    if {name for name in linears if name.rpartition(".")[2] in kinds} == wanted:
        return sorted(kinds)
    return sorted(wanted)


def _config(targets: list[str], base: str, rank: int) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": targets,
    }


def _prepare(opened: OpenRun, weights: BaseWeights, statics: Statics, form: ExportForm) -> WriteFolder:
    updates, tokenizer = dict(statics), opened.tokenizer

    def write(folder: Path) -> Written:
        files = write_lora(updates, weights.base.model, weights.linears, folder, dtype=FLOATS[form.dtype])
        save_tokenizer(tokenizer, folder)
        return Written(files)

    return write


RUNG = Rung(_prepare, ("float32", "float16", "bfloat16"), holds_no_base=True)

__all__ = ["RUNG", "factors_of", "targets_of", "write_lora"]
