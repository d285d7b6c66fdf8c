"""The run folder at the start: whether it may be used, what is written first, and where a resume goes on.

`recipe.yaml` is written last of the opening, so a folder without it holds no run yet, whenever a kill came.
"""

import os
import shutil
from pathlib import Path
from typing import cast

from qd2mora.disk.durable import sync_folder, write_atomically
from qd2mora.disk.sealed import seal_text, unseal_text
from qd2mora.errors import DamagedFile, InputRefused
from qd2mora.recipe import Recipe
from qd2mora.run_folder import RunFolder, is_run, refuse_taken
from qd2mora.training import checkpoint
from qd2mora.training.disk_space import as_trouble
from qd2mora.training.identity import Manifest
from qd2mora.training.journal import forget_after
from qd2mora.training.processes import Processes
from qd2mora.training.progress import Progress, State, StateSource

# What a start that was killed may leave, and the next may take over.
_UNSTARTED = {"LOCK", "manifest.json", ".manifest.json.partial", ".recipe.yaml.partial", "checkpoints"}


def check_folder(folder: RunFolder, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds anything else than what is asked for. Raises InputRefused."""
    if resume and overwrite:
        raise InputRefused("give --resume or --overwrite, not both")
    if resume and not is_run(folder.path):
        raise InputRefused(f"'{folder.path}' is not a run folder: it holds no recipe.yaml; there is nothing to resume")
    if resume or (overwrite and is_run(folder.path)) or _is_unstarted(folder):
        return
    try:
        refuse_taken(folder.path, "output")
    except InputRefused as error:
        if not is_run(folder.path):
            raise
        raise InputRefused(f"{error}; continue it with --resume or replace it with --overwrite") from None


def read_manifest(folder: RunFolder) -> Manifest:
    """Return a run's manifest. Raises DamagedFile."""
    try:
        return cast(Manifest, unseal_text(folder.manifest.read_bytes(), str(folder.manifest)))
    except OSError as error:
        raise DamagedFile(f"{folder.manifest} cannot be read: {error.strerror}; start anew with --overwrite") from error


def restore(folder: RunFolder, source: StateSource, processes: Processes) -> tuple[Progress, list[str]]:
    """Load the newest whole checkpoint; return its progress and what was wrong with newer ones.

    The main process reads it and sends it to the others. Raises DamagedFile, on every process.
    """
    wanted = source.expected()
    newest: State | None = None

    def find() -> list[str] | None:
        nonlocal newest
        newest, problems = checkpoint.newest(folder.checkpoints, *wanted)
        if newest is None:
            return None
        return problems

    problems = processes.from_main(find)
    if problems is None:
        return Progress(), []
    state = processes.state_from_main(newest)
    source.restore(state)
    return state.progress, problems


def open_folder(folder: RunFolder, recipe: Recipe, manifest: Manifest, resume: bool, step: int) -> None:
    """Make the folder, or bring it back to `step`; on the main process, under the lock. Raises DiskTrouble."""
    with as_trouble("the run folder", folder.path):
        if resume:
            checkpoint.set_aside_after(folder.checkpoints, step)
        else:
            _empty(folder)
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.path.parent)
        # Steps after the checkpoint are done again, and would be in the log twice.
        forget_after(folder.metrics, step)
        write_atomically(folder.manifest, seal_text(dict(manifest)))
        write_atomically(folder.recipe, recipe.dump_yaml())


def _is_unstarted(folder: RunFolder) -> bool:
    if not folder.path.is_dir() or any(folder.checkpoints.glob("*")):
        return False
    return {path.name for path in folder.path.iterdir()} <= _UNSTARTED


def _empty(folder: RunFolder) -> None:
    """Remove an earlier run, its recipe last: until then it can be told that a run stood here."""
    names = sorted(os.listdir(folder.path), key=lambda name: name == folder.recipe.name)
    for name in names:
        path = folder.path / name
        if path == folder.lock:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            Path(path).unlink()


__all__ = ["check_folder", "open_folder", "read_manifest", "restore"]
