"""Where a comparison keeps what it has done: what is there is not done again.

`plan.json` says what is compared, `split/` holds the rows, `runs/` the runs, `results/` one file for each that is done,
and `compare.json` the outcome.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from qd2mora.disk.durable import write_json
from qd2mora.errors import InputRefused
from qd2mora.run_folder import refuse_taken

Result = TypeVar("Result")


@dataclass(frozen=True)
class ComparisonFolder:
    """Paths of one comparison."""

    path: Path

    def run(self, arm: str, name: str) -> Path:
        """Return where a run of an arm lies: timing, of the sweep, or with a seed."""
        return self.path / "runs" / arm / name

    def result(self, arm: str, name: str) -> Path:
        """Return where the result of such a run lies."""
        return self.path / "results" / arm / f"{name}.json"

    def begin(self, plan: Mapping[str, object], overwrite: bool) -> bool:
        """Begin the folder, or see that it is of this comparison; tell whether it is new. Raises InputRefused."""
        file = self.path / "plan.json"
        if overwrite and file.is_file():
            shutil.rmtree(self.path)
        if file.is_file():
            before = json.loads(file.read_text(encoding="utf-8"))
            changed = [key for key, value in plan.items() if before[key] != json.loads(json.dumps(value))]
            if changed:
                raise InputRefused(
                    f"--out: '{self.path}' holds another comparison ({' and '.join(changed)} changed); name another "
                    "folder, or start anew with --overwrite"
                )
            return False
        refuse_taken(self.path, "--out")
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(file, plan)
        return True


def found_once(file: Path, kind: type[Result], find: Callable[[], Result]) -> Result:
    """Return what an earlier start found and wrote to `file`; else find it now, and write it."""
    adapter = TypeAdapter(kind)
    if file.is_file():
        return adapter.validate_json(file.read_bytes())
    found = find()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, adapter.dump_python(found))
    return found


__all__ = ["ComparisonFolder", "found_once"]
