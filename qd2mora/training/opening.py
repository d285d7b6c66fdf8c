"""The run folder at the start: whether it may be used, what is written first, and where a resume goes on.

`recipe.yaml` is written last of the opening, so a folder without it holds no run yet, whenever a kill came.
"""

import os
import shutil
from typing import cast

from qd2mora.disk.durable import sync_folder, write_atomically
from qd2mora.disk.file_hash import hash_of_bytes, hash_of_file
from qd2mora.disk.owned import foreign_in
from qd2mora.disk.passing import OLD, is_passing, passing_name
from qd2mora.disk.sealed import seal_text, unseal_text
from qd2mora.errors import DamagedFile, InputRefused
from qd2mora.recipe import Recipe
from qd2mora.run_folder import RunFolder, is_run
from qd2mora.safekeeping.inventory import ADAPTER_NAMES, foreign_in_run, manifest_of_run
from qd2mora.safekeeping.places import check_new_folder, check_place
from qd2mora.training import checkpoint
from qd2mora.training.disk_space import as_trouble
from qd2mora.training.identity import Manifest
from qd2mora.training.journal import forget_after
from qd2mora.training.machine import completed
from qd2mora.training.processes import Processes
from qd2mora.training.progress import Progress, State, StateSource

# What a start that was killed may leave, and the next may take over.
_UNSTARTED = {"LOCK", "manifest.json", ".manifest.json.partial", ".recipe.yaml.partial", "checkpoints"}
_CANNOT_TELL = "which files are the run's cannot be told; name another output, or remove the folder yourself"


def check_folder(folder: RunFolder, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds anything else than what is asked for. Raises InputRefused."""
    if resume and overwrite:
        raise InputRefused("give --resume or --overwrite, not both")
    if resume and not is_run(folder.path):
        raise InputRefused(f"'{folder.path}' is not a run folder: it holds no recipe.yaml; there is nothing to resume")
    check_place(folder.path, "output")
    if resume:
        _refuse_foreign_adapter(folder)
        return
    if _is_unstarted(folder):
        return
    if not is_run(folder.path):
        check_new_folder(folder.path, "output")
        return
    refuse_what_is_not_the_runs(folder)
    if not overwrite:
        raise InputRefused(
            f"output: '{folder.path}' is not empty; name a new folder; continue it with --resume or replace it with "
            "--overwrite"
        )


def refuse_what_is_not_the_runs(folder: RunFolder) -> None:
    """Refuse a folder in which anything but a run of ours lies: it is not replaced. Raises InputRefused."""
    try:
        foreign = foreign_in_run(folder.path)
    except DamagedFile as error:
        raise InputRefused(f"output: '{folder.path}': {error}, so {_CANNOT_TELL}") from error
    if foreign == folder.path:
        raise InputRefused(
            f"output: '{folder.path}' is not empty and no run of ours: it has no sealed manifest.json; name a new "
            "folder"
        )
    if foreign is not None:
        raise InputRefused(
            f"output: '{folder.path}' is a run, and '{foreign}' in it was not written by it; continue the run with "
            "--resume, or name a new folder: nothing is replaced where anything else lies"
        )


def _refuse_foreign_adapter(folder: RunFolder) -> None:
    """Refuse to resume a run whose result could not take its place at the end. Raises InputRefused."""
    foreign = foreign_in(folder.adapter, ADAPTER_NAMES)
    if foreign is not None:
        raise InputRefused(f"output: '{foreign}' was not written by the run, which replaces its adapter; move it away")


def read_manifest(folder: RunFolder) -> Manifest:
    """Return a run's manifest. Raises DamagedFile."""
    try:
        manifest = cast(Manifest, unseal_text(folder.manifest.read_bytes(), str(folder.manifest)))
    except OSError as error:
        raise DamagedFile(f"{folder.manifest} cannot be read: {error.strerror}; name another output") from error
    return {**manifest, "identity": completed(manifest["identity"], manifest.get("threads"))}


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
        # Or a power cut may leave a run whose folder no list names.
        sync_folder(folder.path.parent)
        # Steps after the checkpoint are done again, and would be in the log twice.
        forget_after(folder.metrics, step)
        text = recipe.dump_yaml()
        write_atomically(folder.manifest, seal_text({**manifest, **_known(folder, text, resume)}))
        # Last: a folder without it holds no run yet, whenever a kill came.
        write_atomically(folder.recipe, text)


def _is_unstarted(folder: RunFolder) -> bool:
    if not folder.path.is_dir() or any(folder.checkpoints.glob("*")):
        return False
    names = {path.name for path in folder.path.iterdir() if not is_passing(path.name)}
    try:
        return names <= _UNSTARTED and ("manifest.json" not in names or manifest_of_run(folder.path) is not None)
    except DamagedFile:
        return False


def _known(folder: RunFolder, text: str, resume: bool) -> dict[str, object]:
    """Return what a manifest says of its run's files while the run is at work.

    Until the recipe is written, the one before it stands there. What verbs added to a run before a resume is
    remembered; what training writes is not compared before it has ended.
    """
    recipes, known = {hash_of_bytes(text.encode())}, {}
    before = manifest_of_run(folder.path) if resume else None
    if before is not None:
        now = hash_of_file(folder.recipe)
        if now in before.get("recipes", [now]):
            recipes.add(now)
        listed = before.get("inventory") or before.get("before")
        if listed:
            known["before"] = listed
    return {"recipes": sorted(recipes), **known}


def _empty(folder: RunFolder) -> None:
    """Remove an earlier run, its recipe and manifest last: until then it can be told that a run stood here.

    Raises InputRefused where something came to stand in the folder since it was checked.
    """
    if is_run(folder.path):
        refuse_what_is_not_the_runs(folder)
    elif not _is_unstarted(folder):
        raise InputRefused(f"output: '{folder.path}' is not empty any more; name a new folder")
    last = ("recipe.yaml", "manifest.json")
    names = sorted(os.listdir(folder.path), key=lambda name: (name in last, name == last[1]))
    for name in names:
        path = folder.path / name
        if path == folder.lock:
            continue
        if path.is_dir():
            gone = passing_name(path, OLD)  # half of a folder is nobody's
            os.rename(path, gone)
            shutil.rmtree(gone)
        else:
            path.unlink()


__all__ = ["check_folder", "open_folder", "read_manifest", "refuse_what_is_not_the_runs", "restore"]
