"""Where a comparison keeps what it has done: what is there is not done again.

`plan.json` says what is compared, `split/` holds the rows, `runs/` the runs, `results/` one file for each that is done,
and `compare.json` the outcome. Plan and results are sealed: a changed digit in them is found, and a folder is told by
its sealed plan to be a comparison.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from qd2mora.disk.durable import write_atomically
from qd2mora.disk.owned import foreign_in
from qd2mora.disk.passing import OLD, is_passing, passing_name, remove_passing
from qd2mora.disk.sealed import seal_text, unseal_text
from qd2mora.disk.staged import remove_folder
from qd2mora.errors import DamagedFile, InputRefused
from qd2mora.safekeeping.inventory import foreign_in_run, manifest_of_run
from qd2mora.safekeeping.places import COMPARISON, check_place

Result = TypeVar("Result")
_KILLED = ("LOCK", ".plan.json.partial")


@dataclass(frozen=True)
class ComparisonFolder:
    """Paths of one comparison."""

    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def lock(self) -> Path:
        return self.path / "LOCK"

    def run(self, arm: str, name: str) -> Path:
        """Return where a run of an arm lies: timing, of the sweep, or with a seed."""
        return self.path / "runs" / arm / name

    def result(self, arm: str, name: str) -> Path:
        """Return where the result of such a run lies."""
        return self.path / "results" / arm / f"{name}.json"

    def check(self, overwrite: bool) -> None:
        """Refuse a folder that is no comparison, or to replace one with anything else in it. Raises InputRefused."""
        check_place(self.path, "--out")
        if self.path.is_dir() and not self._is_begun:
            names = [path.name for path in self.path.iterdir() if not is_passing(path.name)]
            if set(names) - {*_KILLED}:
                raise InputRefused(f"--out: '{self.path}' is not empty and no comparison; name a new folder")
        elif os.path.lexists(self.path) and not self.path.is_dir():
            raise InputRefused(f"--out: '{self.path}' is a file; name a new folder")
        elif overwrite and self.path.is_dir():
            foreign = self._foreign()
            if foreign is not None:
                raise InputRefused(
                    f"--out: '{self.path}' is not replaced: '{foreign}' in it was not written by a comparison; name a "
                    "new folder"
                )

    def begin(self, plan: Mapping[str, object], overwrite: bool) -> bool:
        """Begin the folder, or see that it is of this comparison; tell whether it is new; under its lock.

        Raises InputRefused.
        """
        self.check(overwrite)
        if overwrite and self._is_begun:
            self._empty()
        if self._is_begun:
            before = unseal_text(self.plan.read_bytes(), str(self.plan))
            changed = [key for key, value in plan.items() if before.get(key) != json.loads(json.dumps(value))]
            if changed:
                raise InputRefused(
                    f"--out: '{self.path}' holds another comparison ({' and '.join(changed)} changed); name another "
                    "folder, or start anew with --overwrite"
                )
            return False
        write_atomically(self.plan, seal_text(plan))
        return True

    def withdraw(self) -> None:
        """Take back a beginning after which nothing was written."""
        self.plan.unlink()

    @property
    def _is_begun(self) -> bool:
        """Whether a plan of ours stands here. Raises InputRefused where it was changed, or is somebody else's."""
        if not os.path.lexists(self.plan):
            return False
        try:
            unseal_text(self.plan.read_bytes(), str(self.plan))
        except (DamagedFile, OSError) as error:
            raise InputRefused(f"--out: '{self.plan}' is no plan that a comparison wrote; name a new folder") from error
        return True

    def _foreign(self) -> Path | None:
        """Return what is not the comparison's; None: all is."""
        for path in sorted(self.path.iterdir()):
            if is_passing(path.name) or path.name in _KILLED:
                continue
            if path.is_symlink() or path.name not in COMPARISON:
                return path
        split = self.path / "split"
        found = foreign_in(split, [path.name for path in split.glob("*.*.jsonl")]) if split.is_dir() else None
        return found or next(self._foreign_results(), None) or next(self._foreign_runs(), None)

    def _foreign_results(self) -> Iterator[Path]:
        for path in sorted((self.path / "results").glob("*/*")):
            if not is_passing(path.name) and not _is_sealed(path):
                yield path

    def _foreign_runs(self) -> Iterator[Path]:
        for path in sorted((self.path / "runs").glob("*/*")):
            if is_passing(path.name):
                continue
            works = [path]
            if path.name == "quantised":  # 4-bit weights beside the runs, with their locks
                works = [each for each in sorted(path.iterdir()) if each.is_dir() and not is_passing(each.name)]
            yield from (found for found in map(foreign_in_work, works) if found is not None)

    def _empty(self) -> None:
        """Remove what is a comparison's, folder by folder, its plan last."""
        for name in sorted({path.name for path in self.path.iterdir()} - {"plan.json", "LOCK"}):
            remove_passing(self.path / name)  # looked through just now
        self.plan.unlink()


def foreign_in_work(folder: Path) -> Path | None:
    """Return what of a run, or of an export, is not its own; None: all is, or nothing is there."""
    if not folder.is_dir() or folder.is_symlink():
        return folder if os.path.lexists(folder) else None
    try:
        if manifest_of_run(folder) is not None:
            return foreign_in_run(folder)
    except DamagedFile:
        return folder / "manifest.json"
    if not any(path.name != "LOCK" for path in folder.iterdir()):  # a start that was killed
        return None
    return foreign_in(folder)


def remove_work(folder: Path) -> None:
    """Remove a run or an export of a comparison. Raises InputRefused where it holds anything else."""
    found = foreign_in_work(folder)
    if found is not None:
        raise InputRefused(f"'{found}' was not written by the comparison, which would remove it; move it elsewhere")
    if not folder.is_dir():
        return
    if manifest_of_run(folder) is not None:
        remove_run(folder)
        return
    remove_folder(folder, [path.name for path in folder.iterdir()])


def remove_run(folder: Path) -> None:
    """Remove a run that was looked through."""
    gone = passing_name(folder, OLD)
    os.rename(folder, gone)
    remove_passing(gone)


def found_once(file: Path, kind: type[Result], find: Callable[[], Result]) -> Result:
    """Return what an earlier start found and sealed in `file`; else find it now, and write it. Raises DamagedFile."""
    adapter = TypeAdapter(kind)
    if file.is_file():
        return adapter.validate_python(unseal_text(file.read_bytes(), str(file))["found"])
    found = find()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, seal_text({"found": adapter.dump_python(found, mode="json")}))
    return found


def _is_sealed(path: Path) -> bool:
    try:
        return not path.is_symlink() and "found" in unseal_text(path.read_bytes(), str(path))
    except (DamagedFile, OSError):
        return False


__all__ = ["ComparisonFolder", "found_once", "remove_work"]
