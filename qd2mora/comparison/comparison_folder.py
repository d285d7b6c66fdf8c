"""Where a comparison keeps what it has done: what is there is not done again.

`plan.json` says what is compared, `split/` holds the rows, `runs/` the runs, `results/` one file for each that is done,
and `compare.json` the outcome.
"""

import json
import shutil
from collections.abc import Mapping
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

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def split(self) -> Path:
        return self.path / "split"

    @property
    def steps(self) -> Path:
        return self.path / "steps.json"

    @property
    def outcome(self) -> Path:
        return self.path / "compare.json"

    def run(self, arm: str, name: str) -> Path:
        """Return where a run of an arm lies: timing, of the sweep, or with a seed."""
        return self.path / "runs" / arm / name

    def result(self, arm: str, name: str) -> Path:
        """Return where the result of such a run lies."""
        return self.path / "results" / arm / f"{name}.json"

    def begin(self, plan: Mapping[str, object], overwrite: bool) -> bool:
        """Begin the folder, or see that it is of this comparison; tell whether it is new. Raises InputRefused."""
        if overwrite and self.plan.is_file():
            shutil.rmtree(self.path)
        if self.plan.is_file():
            before = json.loads(self.plan.read_text(encoding="utf-8"))
            changed = [key for key, value in plan.items() if before[key] != json.loads(json.dumps(value))]
            if changed:
                raise InputRefused(
                    f"--out: '{self.path}' holds another comparison ({' and '.join(changed)} changed); name another "
                    "folder, or start anew with --overwrite"
                )
            return False
        refuse_taken(self.path, "--out")
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.plan, plan)
        return True


def read_result(file: Path, kind: TypeAdapter[Result]) -> Result | None:
    """Return what an earlier start found, None where it did not come so far."""
    if not file.is_file():
        return None
    return kind.validate_json(file.read_bytes())


def write_result(file: Path, content: object) -> None:
    """Write what was found."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, content)


__all__ = ["ComparisonFolder", "read_result", "write_result"]
