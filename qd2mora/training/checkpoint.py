"""Checkpoints: safetensors and JSON, written to a stage folder, published by one rename, verified by hash.

`checkpoints/step-N/` holds `adapter.safetensors` (trainable tensors by parameter name), `optimizer.safetensors`
(moments as `parameter::moment`) and `state.json`, written last, with the step, the scalars and the other files' hashes.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qd2mora.errors import DamagedFile
from qd2mora.run_folder import staged_folder, write_json

_FILES = ("adapter.safetensors", "optimizer.safetensors")


def save(
    folder: Path, step: int, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, keep: int
) -> Path:
    """Publish `folder/step-N` and remove all but the newest `keep`, after the new one is on disk."""
    moments, scalars = _optimizer_state(parameters, optimizer)
    target = folder / f"step-{step}"
    with staged_folder(target) as stage:
        save_file({name: tensor.detach().cpu() for name, tensor in parameters.items()}, stage / _FILES[0])
        save_file(moments, stage / _FILES[1])
        hashes = {name: _sha256(stage / name) for name in _FILES}
        write_json(stage / "state.json", {"step": step, "scalars": scalars, "sha256": hashes})
    for old in steps_on_disk(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{old}")
    return target


def restore_newest(
    folder: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, list[str]]:
    """Load the newest valid checkpoint in place; return its step (0: none) and what was wrong with newer ones.

    Raises DamagedFile where checkpoints are there and none is whole.
    """
    problems: list[str] = []
    for step in reversed(steps_on_disk(folder)):
        try:
            state, adapter, moments = _read(folder / f"step-{step}", parameters)
        except DamagedFile as error:
            problems.append(str(error))
            continue
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(adapter[name])
        _load_optimizer(parameters, optimizer, moments, state["scalars"])
        return step, problems
    if problems:
        raise DamagedFile(f"no whole checkpoint: {'; '.join(problems)}; start anew with --overwrite")
    return 0, problems


def steps_on_disk(folder: Path) -> list[int]:
    """Return the steps of published checkpoints, ascending."""
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def _read(
    folder: Path, parameters: dict[str, nn.Parameter]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        for name in _FILES:
            if _sha256(folder / name) != state["sha256"][name]:
                raise DamagedFile(f"{folder / name} is not what was written")
        adapter, moments = (load_file(folder / name) for name in _FILES)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DamagedFile(f"{folder} is damaged: {error}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.items()}
    if shapes != {name: tuple(parameter.shape) for name, parameter in parameters.items()}:
        raise DamagedFile(f"{folder} holds other tensors than this recipe trains")
    return state, adapter, moments


def _optimizer_state(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimiser's tensors and scalars by `parameter::moment`, one `::` more for each level of nesting."""
    flat: dict[str, Any] = {}
    state = optimizer.state_dict()["state"]
    for index, name in enumerate(parameters):
        _flatten(state.get(index, {}), name, flat)
    tensors = {
        key: value.detach().cpu().contiguous().clone() for key, value in flat.items() if isinstance(value, Tensor)
    }
    return tensors, {key: value for key, value in flat.items() if key not in tensors}


def _load_optimizer(
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    scalars: dict[str, Any],
) -> None:
    position = {name: index for index, name in enumerate(parameters)}
    state: dict[int, dict[str, Any]] = {}
    for key, value in (tensors | scalars).items():
        name, *path = key.split("::")
        node = state.setdefault(position[name], {})
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _flatten(value: Any, path: str, into: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, child in value.items():
            _flatten(child, f"{path}::{key}", into)
    else:
        into[path] = value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


__all__ = ["restore_newest", "save", "steps_on_disk"]
