"""Checkpoints: safetensors and JSON, sealed, published by one rename, read back before an older one goes.

`checkpoints/step-N/` holds `adapter.safetensors` (trainable tensors by parameter name), `optimizer.safetensors`
(moments as `parameter::moment`) and `manifest.json`, written last: the declared inventory (dtype and shape of every
tensor), the scalars, the progress, and the hash of each file and of itself.

They are saved beside training: a copy of the small trainable state is taken, and written while the next steps run. One
save is in flight at a time, with the guarantees of one that is waited for: until its last rename the older checkpoints
are the newest. Where memory has no room for the copy, training waits.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from qd2mora.base.host_memory import available_bytes
from qd2mora.disk.durable import write_file
from qd2mora.disk.owned import foreign_in
from qd2mora.disk.sealed import open_manifest, read_listed, seal_folder, verify_folder
from qd2mora.disk.staged import remove_folder, staged_folder
from qd2mora.disk.tensor_file import Inventory, encoded, inventory_of
from qd2mora.errors import DamagedFile, NotFinite, StopError
from qd2mora.safekeeping.inventory import CHECKPOINT_NAMES
from qd2mora.training.disk_space import as_trouble
from qd2mora.training.progress import Progress, State, StateSource, best_of_json, owner_of

ADAPTER, OPTIMIZER = "adapter.safetensors", "optimizer.safetensors"


def save(folder: Path, state: State, keep: int) -> Path:
    """Publish `folder/step-N`; once it is read back whole, remove all but the newest `keep`.

    Raises NotFinite where a tensor is not, DamagedFile where the disk gave back something else, OSError.
    """
    # First: a moment that is not finite would poison the resume, while every hash of it would be right.
    _refuse_not_finite(state)
    target = folder / f"step-{state.progress.step}"
    with staged_folder(target, CHECKPOINT_NAMES) as stage:
        tensors = {ADAPTER: state.adapter, OPTIMIZER: state.moments}
        files = {name: write_file(stage / name, encoded(content)) for name, content in tensors.items()}
        inventory = {name: inventory_of(content) for name, content in tensors.items()}
        content = {"inventory": inventory, "scalars": state.scalars, "progress": asdict(state.progress)}
        seal_folder(stage, files, content)
        # Read back before it gets its name: what a failing disk returned is then no checkpoint, and the older ones
        # stay.
        verify_folder(stage)
    for old in steps_on_disk(folder)[:-keep]:
        place = folder / f"step-{old}"
        if foreign_in(place, CHECKPOINT_NAMES) is None:  # else it stays, with what somebody put there
            remove_folder(place, CHECKPOINT_NAMES)
    return target


def newest(folder: Path, adapter: Inventory, moments: Inventory) -> tuple[State | None, list[str]]:
    """Return the newest valid checkpoint, and what was wrong with newer ones. Nothing on disk is touched.

    `adapter` and `moments` are what a checkpoint has to hold. Raises DamagedFile where some are there and none is
    whole.
    """
    problems: list[str] = []
    for step in reversed(steps_on_disk(folder)):
        try:
            return read(folder / f"step-{step}", adapter, moments), problems
        except DamagedFile as error:
            problems.append(str(error))
    if problems:
        raise DamagedFile(f"no whole checkpoint: {'; '.join(problems)}; start anew in another output")
    return None, problems


def set_aside_after(folder: Path, step: int) -> None:
    """Rename checkpoints newer than `step`, which are damaged, so that they do not count as kept ones."""
    for damaged in [other for other in steps_on_disk(folder) if other > step]:
        place = folder / f"damaged-step-{damaged}"
        if place.exists():
            remove_folder(place, CHECKPOINT_NAMES)
        os.rename(folder / f"step-{damaged}", place)


def steps_on_disk(folder: Path) -> list[int]:
    """Return the steps of published checkpoints, ascending."""
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*")]
    # Numbers as this package writes them: `step-007` is somebody else's.
    return sorted(int(name) for name in names if name.isdecimal() and name.isascii() and str(int(name)) == name)


def read(folder: Path, adapter: Inventory, moments: Inventory) -> State:
    """Return a checkpoint that holds exactly the tensors of this run. Raises DamagedFile."""
    manifest = open_manifest(folder)
    try:
        tensors = {name: load_tensors(read_listed(folder, manifest, name)) for name in (ADAPTER, OPTIMIZER)}
        progress, scalars = Progress(**manifest["progress"]), dict(manifest["scalars"])
        progress.best = best_of_json(progress.best)
        progress.rest = {task: (float(best), int(resting)) for task, (best, resting) in progress.rest.items()}
        declared = {name: _as_inventory(manifest["inventory"][name]) for name in (ADAPTER, OPTIMIZER)}
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DamagedFile(f"{folder} is damaged: {error}") from error
    if progress.step != int(folder.name.removeprefix("step-")):
        raise DamagedFile(f"{folder} holds step {progress.step}")
    state = State(tensors[ADAPTER], tensors[OPTIMIZER], scalars, progress)
    _compare(folder, declared, {ADAPTER: inventory_of(state.adapter), OPTIMIZER: inventory_of(state.moments)})
    # A parameter that never had a gradient has no moments; one that has any has all.
    owners = {owner_of(name) for name in state.moments}
    wanted = {name: entry for name, entry in moments.items() if owner_of(name) in owners}
    _compare(folder, {ADAPTER: adapter, OPTIMIZER: wanted}, declared)
    if progress.applied and not owners:
        raise DamagedFile(f"{folder} holds no moments after {progress.applied} updates")
    return state


def _as_inventory(content: dict[str, tuple[str, list[int]]]) -> Inventory:
    return {name: (str(dtype), list(shape)) for name, (dtype, shape) in content.items()}


def _compare(folder: Path, wanted: dict[str, Inventory], there: dict[str, Inventory]) -> None:
    for file, entries in wanted.items():
        for name in sorted(entries.keys() | there[file].keys()):
            if entries.get(name) != there[file].get(name):
                raise DamagedFile(
                    f"{folder / file} holds other tensors than this recipe trains: {name} is "
                    f"{there[file].get(name, 'not there')}, not {entries.get(name, 'wanted')}"
                )


def _refuse_not_finite(state: State) -> None:
    named: dict[str, Tensor] = {**state.adapter, **state.moments}
    for name, tensor in named.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NotFinite(f"step {state.progress.step} is not saved: {name} is not finite; continue with --resume")


@dataclass
class Saver:
    """Publishes checkpoints from the main process; the others only take part in collecting the state."""

    folder: Path
    keep: int
    source: StateSource
    is_main: bool = True
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "save"))
    _job: "Future[None] | None" = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the save in flight; what it has to say yields to an error that is on its way."""
        try:
            self.finish()
        except StopError:
            if error is None:
                raise
        finally:
            self._writer.shutdown()

    def begin(self, progress: Progress) -> None:
        """Begin to save, after the one in flight has ended. Raises what that one raised."""
        self.finish()
        # On every process, for shards are gathered together; copied, because the next update writes into the same
        # tensors.
        adapter, moments, scalars = self.source.collect(copied=True)
        if self.is_main:
            state = State(adapter, moments, scalars, replace(progress, best=dict(progress.best)))
            self._job = self._writer.submit(self._write, state)
            if not _has_room_for(state):
                # Its copy is let go before the next micro batch asks for memory.
                wait([self._job])

    @property
    def has_failed(self) -> bool:
        """Whether the last save has ended badly: `finish` raises NotFinite, DiskTrouble, DamagedFile."""
        return self._job is not None and self._job.done() and self._job.exception() is not None

    def finish(self) -> None:
        """Wait for the save in flight. Raises what it raised."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def _write(self, state: State) -> None:
        with as_trouble(f"checkpoint of step {state.progress.step}", self.folder):
            save(self.folder, state, self.keep)


def _has_room_for(state: State) -> bool:
    """Tell whether the copy leaves as much memory again to the rest of the machine."""
    size = sum(tensor.nbytes for tensor in (*state.adapter.values(), *state.moments.values()))
    return available_bytes() > size


__all__ = ["Saver", "newest", "read", "save", "set_aside_after", "steps_on_disk"]
