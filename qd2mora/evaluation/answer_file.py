"""Answers that outlive a kill: a finished batch is a few lines on disk, under a first line that says what was asked.

A start with the same question goes on; one with another is refused by name, so that scores never mix two models.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter

from qd2mora.disk.durable import write_atomically, write_bytes_atomically
from qd2mora.disk.file_hash import hash_of_bytes
from qd2mora.disk.sealed import seal_text, unseal_text
from qd2mora.errors import DamagedFile, InputRefused
from qd2mora.evaluation.score import Record
from qd2mora.safekeeping.places import check_file

Question = Mapping[str, object]
"""What answers depend on, by name."""
TaskNumbers = dict[str, dict[str, str | int | float]]
"""What was measured, by task and name."""
_RECORD = TypeAdapter(Record)
_SEAL = "sha256"
_log = logging.getLogger(__name__)


class AnswerFile:
    """The records of an evaluation, by task; appends to `path`, or holds them in memory alone.

    Each line carries a hash of itself and of the hash before it: a line that was changed, or whose place is another's,
    is told, and what stands from there on is asked again.
    """

    def __init__(self, path: Path | None = None, question: Question | None = None) -> None:
        """Open or begin the file. Raises InputRefused where it answers another question, DamagedFile."""
        self.path = path
        self.records: dict[str, list[Record]] = {}
        self._seal = ""
        if path is None:
            return
        head = self._sealed({"asked": dict(question or {})})
        if path.is_file() and not _is_cut_at_once(path, head):
            self._resume(path, question or {})
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomically(path, head)

    def add(self, task: str, records: list[Record]) -> None:
        """Take a finished batch, and force it to disk."""
        self.records.setdefault(task, []).extend(records)
        if self.path is not None:
            with self.path.open("ab") as file:
                # One write and one force a batch: a kill leaves whole lines, and one at most that is cut, which
                # `_resume` drops.
                file.write(b"".join(self._sealed({"task": task, **asdict(record)}) for record in records))
                file.flush()
                os.fsync(file.fileno())

    def _resume(self, path: Path, question: Question) -> None:
        """Take the records of an earlier start, and drop what a kill cut short or somebody changed."""
        content = path.read_bytes()
        lines = content[: content.rfind(b"\n") + 1].splitlines() or [b""]
        _refuse_other(path, _parsed(lines[0]), question)
        self._seal = ""
        if self._sealed({"asked": dict(question)}) != lines[0] + b"\n":
            raise DamagedFile(f"--out: '{path}' does not begin as it was written; remove it, and all is asked again")
        whole = [lines[0] + b"\n"]
        for line in lines[1:]:
            found = self._unsealed(line)
            if found is None:
                break
            self.records.setdefault(str(found.pop("task")), []).append(_RECORD.validate_python(found))
            whole.append(line + b"\n")
        if len(whole) < len(lines):
            _log.warning("%s: line %d is not what was written; asked again from there", path, len(whole) + 1)
        if sum(map(len, whole)) != len(content):
            write_bytes_atomically(path, b"".join(whole))

    def _sealed(self, content: Mapping[str, object]) -> bytes:
        """Return a line that follows the one before it."""
        self._seal = _chained(self._seal, content)
        return _line({**content, _SEAL: self._seal})

    def _unsealed(self, line: bytes) -> dict[str, object] | None:
        """Return what a line that follows the one before it says; None where it does not."""
        found = _parsed(line)
        if found is None or "task" not in found or _line(found) != line + b"\n":
            return None
        seal = found.pop(_SEAL, None)
        if seal != _chained(self._seal, found):
            return None
        self._seal = str(seal)
        return found


class HarnessFile:
    """The numbers of the harness's tasks that are done, in a sealed file of JSON, or in memory alone."""

    def __init__(self, path: Path | None, question: Question) -> None:
        """Open the file where there is one. Raises InputRefused where it answers another question, DamagedFile."""
        self.path, self.question = path, dict(question)
        self.results: dict[str, TaskNumbers] = {}
        if path is not None and path.is_file() and path.stat().st_size:
            content = path.read_bytes()
            _refuse_other(path, _parsed(content), self.question)
            self.results = unseal_text(content, str(path))["results"]

    def add(self, task: str, numbers: TaskNumbers) -> None:
        """Take a finished task's numbers; a group of tasks brings those of each."""
        self.results[task] = numbers
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, seal_text({"asked": self.question, "results": self.results}))


def check_scores_place(out: Path, rows: Path) -> None:
    """Refuse, before anything is asked, scores and answers that would lie where they may not. Raises InputRefused."""
    for place in (out, rows):
        check_file(place, "--out", b"{", "scores or answers")
    if not out.is_file() or not out.stat().st_size:
        return
    scores = _parsed(out.read_bytes())
    if scores is None or not all(isinstance(numbers, dict) for numbers in scores.values()) or "asked" in scores:
        raise InputRefused(f"--out: '{out}' is there and holds no scores; name another file, or remove that one")


def _is_cut_at_once(path: Path, head: bytes) -> bool:
    """Tell whether a kill, of an earlier version, left the file with no more than a part of its first line."""
    content = path.read_bytes()
    return b"\n" not in content and (not content.strip(b"\0") or head.startswith(content))


def _refuse_other(path: Path, head: Mapping[str, object] | None, question: Question) -> None:
    before = (head or {}).get("asked")
    if not isinstance(before, dict):
        raise InputRefused(f"--out: '{path}' is not a file of answers; name another")
    changed = [name for name, value in question.items() if before.get(name) != value]
    if changed:
        raise InputRefused(
            f"--out: '{path}' holds answers to another question ({', '.join(changed)} changed); name another file, "
            "or remove that one"
        )


def _chained(before: str, content: Mapping[str, object]) -> str:
    return hash_of_bytes(before.encode() + _line(content))


def digest(content: object) -> str:
    """Return a hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _line(content: Mapping[str, object]) -> bytes:
    return json.dumps(content, allow_nan=False).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, object] | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    if isinstance(content, dict):
        return content
    return None


__all__ = ["AnswerFile", "HarnessFile", "TaskNumbers", "check_scores_place", "digest"]
