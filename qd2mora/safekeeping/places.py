"""Where something may be written: one check for every verb.

An output never goes into a folder that is sealed, into what a run or a comparison calls its own, or into the folder of
a model; a file is replaced only by its like. Whoever makes an output holds its lock.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qd2mora.disk.durable import write_bytes_atomically
from qd2mora.disk.lock import is_held_here, lock_beside, locked
from qd2mora.disk.sealed import MANIFEST, read_manifest
from qd2mora.errors import DamagedFile, InputRefused
from qd2mora.safekeeping.inventory import OWN, noted

COMPARISON = (
    "plan.json",
    "split",
    "runs",
    "results",
    "compare.json",
    "compare.md",
    "compare.png",
    "steps.json",
    "LOCK",
)
"""What a comparison's folder holds."""
EXPORT = "export"
"""The one name of a run's own that a verb may write to, where nothing stands there."""
_MODEL = ("config.json", "adapter_config.json")


def check_place(out: Path, what: str) -> None:
    """Refuse a place that is inside something that is not to be changed. Raises InputRefused."""
    if str(out).startswith("~"):
        raise InputRefused(f"{what}: '{out}': ~ is the shell's word for your folder; write the whole path")
    real = Path(os.path.realpath(out))
    if not os.path.exists(real) and os.path.islink(out):
        raise InputRefused(f"{what}: '{out}' is a link to nothing; name a place of its own")
    for folder in real.parents:
        name = real.relative_to(folder).parts[0]
        if os.path.lexists(folder) and not folder.is_dir():
            raise InputRefused(f"{what}: '{out}' lies in '{folder}', which is a file; name another place")
        inside = _holder(folder, name, real)
        if inside:
            raise InputRefused(f"{what}: '{out}' lies in {inside}; name a place outside it")


def check_new_folder(out: Path, what: str) -> None:
    """Refuse an output folder that is there and holds anything, or lies where none may. Raises InputRefused."""
    check_place(out, what)
    if out.is_dir():
        if any(out.iterdir()):
            raise InputRefused(f"{what}: '{out}' is not empty; name a new folder")
    elif os.path.lexists(out):
        raise InputRefused(f"{what}: '{out}' is a file; name a new folder")


def check_file(out: Path, what: str, begins: bytes, kind: str) -> None:
    """Refuse a file whose folder is not there, or that would replace another than its like: one that `begins` so.

    Raises InputRefused.
    """
    check_place(out, what)
    if out.is_dir():
        raise InputRefused(f"{what}: '{out}' is a folder; name a file in a folder that is there")
    if not os.path.lexists(out):
        return
    if not out.is_file():
        raise InputRefused(f"{what}: '{out}' is no ordinary file; name another")
    with out.open("rb") as file:
        start = file.read(len(begins))
        # An empty file holds nothing of anybody's: a kill at the first write leaves one.
        if start and not start.startswith(begins):
            raise InputRefused(f"{what}: '{out}' is there and is not {kind}; name another file, or remove that one")


@contextmanager
def taken(out: Path, what: str) -> Iterator[Path]:
    """Hold a new output folder's lock, and note it in the run that it lies in; yield where it really lies.

    Raises InputRefused where it may not be written, or another process writes it.
    """
    check_new_folder(out, what)
    real = Path(os.path.realpath(out))
    with locked(lock_beside(real), what, out):
        check_new_folder(out, what)  # what was true before the lock need not be
        with noted(real):
            yield real


@contextmanager
def writing(what: str, *files: Path | None) -> Iterator[None]:
    """Hold the lock of the first file while all are written, and note them in the run that they lie in."""
    given = [file for file in files if file is not None]
    if not given:
        yield
        return
    with locked(lock_beside(given[0]), what, given[0]), noted(*given):
        yield


def _holder(folder: Path, name: str, real: Path) -> str | None:
    """Return what a folder is that nothing may be written into under this name; None where it may."""
    if not os.path.lexists(folder / MANIFEST):
        return _unsealed_holder(folder, name)
    try:
        manifest = read_manifest(folder)
    except DamagedFile:
        return f"'{folder}', whose {MANIFEST} is damaged"
    if manifest is None:
        return _unsealed_holder(folder, name)
    if "identity" not in manifest:
        return f"'{folder}', a sealed folder"
    is_free = name not in OWN or (name == EXPORT and real.parent == folder)
    if is_free or (name == "report.html" and real.parent == folder):
        return None
    return f"'{folder}' under the name '{name}', which is a part of that run"


def _unsealed_holder(folder: Path, name: str) -> str | None:
    if any((folder / each).is_file() for each in _MODEL) and any(folder.glob("*.safetensors")):
        return f"'{folder}', the folder of a model"
    if (folder / "recipe.yaml").is_file() and any((folder / each).is_dir() for each in ("adapter", "checkpoints")):
        if name in OWN:
            return f"'{folder}' under the name '{name}', which is a part of that run"
    if (folder / "plan.json").is_file() and (folder / "runs").is_dir() and name in COMPARISON:
        if is_held_here(folder / "LOCK"):  # the comparison itself trains and exports in it
            return None
        return f"'{folder}' under the name '{name}', which is a part of that comparison"
    return None


def write_beside(path: Path, content: bytes, what: str) -> None:
    """Write the first of two files, the second of which says that both are there. Raises InputRefused.

    A kill between them leaves this one: the next try finds the same content and goes on; any other is somebody's.
    """
    if not os.path.lexists(path):
        write_bytes_atomically(path, content)
    elif not path.is_file() or path.read_bytes() != content:
        raise already_there(path, what)


def already_there(path: Path, what: str) -> InputRefused:
    """Return the refusal of an output that would take the place of something."""
    return InputRefused(f"{what}: '{path}' is there already; name a new file, or remove that one")


__all__ = [
    *("COMPARISON", "already_there", "check_file", "check_new_folder", "check_place", "taken", "write_beside"),
    "writing",
]
