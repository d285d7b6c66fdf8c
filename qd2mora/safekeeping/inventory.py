"""What a run's folder holds: the names that are a run's own, and the list of all of it that its manifest seals.

`manifest.json` is written when a run begins, with the hash of its recipe. When the run ends, the hashes of its files,
and of the manifests of the sealed folders in it, are added as `inventory`; whoever writes into the run later notes it
there, before (as being written) and after. A resume opens the list again: what is at work cannot be compared.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from qd2mora.disk.durable import write_atomically
from qd2mora.disk.file_hash import SizeAndHash
from qd2mora.disk.lock import lock_beside, locked
from qd2mora.disk.owned import foreign_in
from qd2mora.disk.passing import is_passing
from qd2mora.disk.sealed import MANIFEST, hash_of_plain_file, read_manifest, seal_text, verify_folder
from qd2mora.disk.untrusted import TOKENIZER_NAMES
from qd2mora.errors import DamagedFile, InputRefused

RECIPE, LOCK = "recipe.yaml", "LOCK"
TRAINED = (RECIPE, "metrics.jsonl")
"""Files that training writes."""
LATER = ("routing.json", "scores.json", "earlier_tasks.json", "samples.json", "report.html")
"""Files that the end of a run, or a verb after it, writes."""
FOLDERS = ("adapter", "best", "checkpoints", "export", "static")
HEAD = "reward_head.safetensors"
ADAPTER_NAMES = ("adapter_model.safetensors", "adapter_config.json", HEAD, MANIFEST, "README.md")
"""What an adapter's folder holds; the head where it scores answers; the last is PEFT's, and not listed."""
CHECKPOINT_NAMES = ("adapter.safetensors", "optimizer.safetensors", MANIFEST)
"""What a checkpoint holds; a damaged one is told by them to be ours."""
OWN = (*TRAINED, *LATER, MANIFEST, LOCK, *FOLDERS, *TOKENIZER_NAMES)
"""Every name in a run's folder that no other file may take."""
_KILLED = (".manifest.json.partial", ".recipe.yaml.partial", ".metrics.jsonl.partial", ".manifest.json.lock")
"""What a start that was killed, of this version or an earlier one, may leave."""
_TRACKED = "qd2mora"
"""Where tensorboard writes, which accelerate calls by the project's name."""
_STEP = re.compile(r"(?:damaged-)?step-\d+")
Manifest = dict[str, Any]


def manifest_of_run(run: Path) -> Manifest | None:
    """Return the manifest of a run of ours; None where there is none. Raises DamagedFile where it was changed."""
    manifest = read_manifest(run)
    if manifest is None or "identity" not in manifest:
        return None
    return manifest


def foreign_in_run(run: Path) -> Path | None:
    """Return what of a run's folder is not the run's; None: all is. Raises DamagedFile where that cannot be told."""
    manifest = manifest_of_run(run)
    if manifest is None:
        return run
    listed = manifest.get("inventory") or manifest.get("before") or {"files": {}, "folders": {}}
    for entry in sorted(os.scandir(run), key=lambda entry: entry.name):
        found = _foreign_entry(run, entry.name, manifest, listed)
        if found is not None:
            return found
    return None


def _foreign_entry(run: Path, name: str, manifest: Manifest, listed: Manifest) -> Path | None:
    path = run / name
    if is_passing(name) or (path.is_file() and name in _KILLED):
        return None
    if path.is_symlink():
        return path
    if name == RECIPE and manifest.get("recipes") and _hash_of(path) not in manifest["recipes"]:
        return path
    if path.is_file():
        is_listed = name in listed["files"] and _is_as_listed(path, listed["files"][name])
        return None if is_listed or (name in OWN and name not in FOLDERS) else path
    return _foreign_folder(path, name, listed)


def _foreign_folder(path: Path, name: str, listed: Manifest) -> Path | None:
    if name == "adapter":
        return foreign_in(path, ADAPTER_NAMES)
    if name in ("best", "checkpoints"):
        return _foreign_step(path, ADAPTER_NAMES if name == "best" else CHECKPOINT_NAMES)
    if name == "static":
        found = (foreign_in(each) for each in sorted(path.iterdir()) if not is_passing(each.name))
        return next((each for each in found if each is not None), None)
    if name == _TRACKED:
        return next((each for each in sorted(path.rglob("*")) if each.is_symlink() or not _is_tracked(each)), None)
    if name == "additional_chat_templates":
        return next((each for each in sorted(path.iterdir()) if f"{name}/{each.name}" not in listed["files"]), None)
    if name == "export" or name in listed["folders"]:
        return foreign_in(path)
    return path


def _is_tracked(path: Path) -> bool:
    return path.is_dir() or path.name.startswith("events.out.tfevents.") or path.name == "hparams.yml"


def _foreign_step(folder: Path, names: Sequence[str]) -> Path | None:
    for path in sorted(folder.iterdir()):
        if is_passing(path.name) or (path.name == "best.json" and path.is_file() and not path.is_symlink()):
            continue
        if not _STEP.fullmatch(path.name):
            return path
        found = foreign_in(path, names)
        if found is not None:
            return found
    return None


def seal_run(run: Path) -> None:
    """List what a finished run holds in its manifest. Raises DamagedFile, OSError."""
    manifest = manifest_of_run(run)
    if manifest is None:
        raise DamagedFile(f"{run / MANIFEST} is not there")
    # What verbs had noted before a resume opened the list is kept, where it is there still and no name of the run's
    # own.
    before = manifest.pop("before", None) or manifest.get("inventory") or {"files": {}, "folders": {}}
    files, folders = _holds(run)
    extra = {name: entry for name, entry in before["files"].items() if _is_extra(run, name)}
    extra_folders = {name: entry for name, entry in before["folders"].items() if _is_extra(run, name)}
    listed = {name: _entry(run / name) for name in files}
    sealed = {name: _hash_of(run / name / MANIFEST) for name in folders}
    recipes = [listed[RECIPE]["sha256"]]
    manifest |= {"inventory": {"files": extra | listed, "folders": extra_folders | sealed}, "recipes": recipes}
    write_atomically(run / MANIFEST, seal_text(manifest))


def _is_extra(run: Path, name: str) -> bool:
    return name.partition("/")[0] not in OWN and os.path.lexists(run / name)


def _holds(run: Path) -> tuple[list[str], list[str]]:
    """Return the files and the sealed folders that are a run's own, as they stand."""
    folders = [name for name in ("adapter", "export") if (run / name / MANIFEST).is_file()]
    for kind in ("best", "checkpoints"):
        folders += [f"{kind}/{path.name}" for path in sorted((run / kind).glob("step-*")) if _STEP.fullmatch(path.name)]
    folders += [f"static/{path.parent.name}" for path in sorted((run / "static").glob(f"*/{MANIFEST}"))]
    names = [*TRAINED, *LATER, *TOKENIZER_NAMES, "best/best.json"]
    names += [f"{path.parent.name}/{path.name}" for path in (run / "additional_chat_templates").glob("*")]
    names += [f"{folder}/{path.name}" for folder in folders for path in (run / folder).glob("*.md")]
    return [name for name in names if (run / name).is_file()], folders


@contextmanager
def noted(*paths: Path | None) -> Iterator[None]:
    """Note files or sealed folders that the block writes, in the inventory of the run that they lie in, if in any."""
    inside = [(run, path) for path in paths if path is not None for run in _runs_above(path)]
    for run, path in inside:
        _change(run, partial(_announce, _name(run, path)))
    try:
        yield
    finally:
        for run, path in inside:
            _change(run, partial(_note, run, path))


def _announce(name: str, listed: Manifest) -> None:
    # Nothing stands for "being written": after a kill, a file on its way is told from one that somebody changed.
    listed["files"][name] = None


def _note(run: Path, path: Path, listed: Manifest) -> None:
    name = _name(run, path)
    listed["files"].pop(name, None)
    listed["folders"].pop(name, None)
    if path.is_dir():
        for folder in [path, *sorted(path.iterdir())]:
            if (folder / MANIFEST).is_file():
                listed["folders"][_name(run, folder)] = _hash_of(folder / MANIFEST)
    elif path.is_file():
        listed["files"][name] = _entry(path)


def _name(run: Path, path: Path) -> str:
    return Path(os.path.realpath(path)).relative_to(os.path.realpath(run)).as_posix()


def _runs_above(path: Path) -> list[Path]:
    real = Path(os.path.realpath(path))
    if any(is_passing(part) for part in real.parts):  # not there yet under its name
        return []
    for folder in real.parents:
        # A folder above whose manifest is damaged is none to note anything in; its own verbs say so.
        with suppress(DamagedFile):
            manifest = manifest_of_run(folder) if os.path.lexists(folder / MANIFEST) else None
            if manifest is not None:
                return [folder] if "inventory" in manifest else []
    return []


def _change(run: Path, change: Callable[[Manifest], object]) -> None:
    """Change the inventory while nobody else does; a run that somebody opened meanwhile has none."""
    # Writers of one run (a score beside an export) hold the list for moments; ten seconds mean that one hangs.
    until = time.monotonic() + 10
    while True:
        try:
            with locked(lock_beside(run / MANIFEST), "the list of", run):
                manifest = manifest_of_run(run)
                if manifest is not None and "inventory" in manifest:
                    change(manifest["inventory"])
                    write_atomically(run / MANIFEST, seal_text(manifest))
                return
        except InputRefused:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def check_tokenizer_files(run: Path) -> None:
    """Compare a finished run's tokenizer with its inventory before it is used. Raises DamagedFile."""
    manifest = manifest_of_run(run) if os.path.lexists(run / MANIFEST) else None
    files = (manifest or {}).get("inventory", {"files": {}})["files"]
    for name in files:
        if name.partition("/")[0] in TOKENIZER_NAMES or name.startswith("additional_chat_templates/"):
            _compare(run, name, files[name])


def verify_run(run: Path) -> tuple[int, list[str]]:
    """Compare all that a run holds with what was written; return the bytes read, and what could not be compared.

    Raises DamagedFile.
    """
    manifest = manifest_of_run(run)
    if manifest is None:
        raise DamagedFile(f"{run} lacks {MANIFEST!r}")
    if manifest.get("recipes") and _hash_of(run / RECIPE) not in manifest["recipes"]:
        raise DamagedFile(f"{run / RECIPE} is not what was written")
    listed = manifest.get("inventory")
    if listed is None:
        return _verify_unlisted(run, "recipes" in manifest)
    said = [f"{name} was being written when its writer ended" for name, entry in listed["files"].items() if not entry]
    size = sum(_compare(run, name, entry) for name, entry in listed["files"].items() if entry)
    for name, digest in listed["folders"].items():
        _refuse_link(run, name)
        size += verify_folder(run / name, lambda name: not name.endswith(".md"))
        if _hash_of(run / name / MANIFEST) != digest:
            raise DamagedFile(f"{run / name / MANIFEST} is not the one that the run lists")
    said += _refuse_added(run, listed)
    return size, said


def _refuse_added(run: Path, listed: Manifest) -> list[str]:
    """Refuse what stands in a run and is not listed; return what of it a kill may have left."""
    said: list[str] = []
    known = {*listed["files"], *listed["folders"], MANIFEST, LOCK}
    above = {"/".join(name.split("/")[:depth]) for name in known for depth in range(1, name.count("/") + 1)}
    for folder, folders, files in os.walk(run):
        place = Path(folder).relative_to(run)
        for name in sorted([*folders, *files]):
            path = (place / name).as_posix()
            if is_passing(name) or path in _KILLED:
                said.append(f"{path} was left by a process that ended")
            elif path == _TRACKED:
                said.append(f"{path} is a tracker's, and not compared")
            elif place.name and _STEP.fullmatch(name) and name.startswith("damaged"):
                said.append(f"{path} was set aside as damaged")
            elif path in LATER or (path in FOLDERS and name in folders):
                if path not in known | above:
                    said.append(f"{path} is not listed yet")
            elif path not in known | above and path.rpartition("/")[0] not in listed["folders"]:
                raise DamagedFile(f"{run} holds {path!r}, which was not written with it")
        # On into folders that only lead to what is listed: sealed ones were compared whole by now.
        folders[:] = [name for name in folders if (place / name).as_posix() in above]
    return said


def _verify_unlisted(run: Path, is_recent: bool) -> tuple[int, list[str]]:
    """Check what can be checked of a run that is not finished, or that an earlier version made."""
    why = "it was made by an earlier version"
    if is_recent:
        why = "the run is not finished"
    said = [f"no list of its files, as {why}; only its sealed folders, manifest and recipe are compared"]
    sealed = [run / "adapter"] if os.path.lexists(run / "adapter") else []
    for kind in ("checkpoints", "best"):
        sealed += sorted((run / kind).glob("step-*"))
    if os.path.lexists(run / "export"):
        sealed.append(run / "export")
    sealed += [path.parent for path in sorted((run / "static").glob(f"*/{MANIFEST}"))]
    size = 0
    for folder in sealed:
        _refuse_link(run, folder.relative_to(run).as_posix())
        size += verify_folder(folder, lambda name: not name.endswith(".md"))
    return size, said


def _refuse_link(run: Path, name: str) -> None:
    for each in (run / name, *(run / name).parents):
        if each == run:
            return
        if each.is_symlink():
            raise DamagedFile(f"{each} is a link; nothing is followed out of a run")


def _compare(run: Path, name: str, entry: Manifest) -> int:
    _refuse_link(run, name)
    if not os.path.lexists(run / name):
        raise DamagedFile(f"{run} lacks {name!r}")
    if not _is_as_listed(run / name, entry):
        raise DamagedFile(f"{run / name} is not what was written")
    return int(entry["bytes"])


def _is_as_listed(path: Path, entry: Manifest | None) -> bool:
    return entry is None or hash_of_plain_file(path) == SizeAndHash(entry["bytes"], entry["sha256"])


def _entry(path: Path) -> Manifest:
    size, digest = hash_of_plain_file(path)
    return {"bytes": size, "sha256": digest}


def _hash_of(path: Path) -> str:
    return hash_of_plain_file(path).sha256


__all__ = [
    "ADAPTER_NAMES",
    "CHECKPOINT_NAMES",
    "HEAD",
    "OWN",
    "check_tokenizer_files",
    "foreign_in_run",
    "manifest_of_run",
    "noted",
    "seal_run",
    "verify_run",
]
