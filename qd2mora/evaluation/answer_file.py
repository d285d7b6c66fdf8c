"""Answers that outlive a kill: a finished batch is a few lines on disk, under a first line that says what was asked.

A start with the same question goes on; one with another is refused by name, so that scores never mix two models.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter

from qd2mora.disk.durable import write_file, write_json
from qd2mora.errors import InputRefused
from qd2mora.evaluation.score import Record

Question = Mapping[str, object]
"""What answers depend on, by name."""
TaskNumbers = dict[str, dict[str, str | int | float]]
"""What was measured, by task and name."""
_RECORD = TypeAdapter(Record)


class AnswerFile:
    """The records of an evaluation, by task; appends to `path`, or holds them in memory alone."""

    def __init__(self, path: Path | None = None, question: Question | None = None) -> None:
        """Open or begin the file. Raises InputRefused where it answers another question."""
        self.path = path
        self.records: dict[str, list[Record]] = {}
        if path is None:
            return
        question = question or {}
        if path.is_file():
            self._resume(path, question)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, [_line({"asked": dict(question)})])

    def add(self, task: str, records: list[Record]) -> None:
        """Take a finished batch, and force it to disk."""
        self.records.setdefault(task, []).extend(records)
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write(b"".join(_line({"task": task, **asdict(record)}) for record in records))
                file.flush()
                os.fsync(file.fileno())

    def _resume(self, path: Path, question: Question) -> None:
        """Take the records of an earlier start, and drop what a kill cut short."""
        content = path.read_bytes()
        lines = content[: content.rfind(b"\n") + 1].splitlines() or [b""]
        _refuse_other(path, lines[0], question)
        num_whole = 1
        for line in lines[1:]:
            found = _parsed(line)
            if found is None:
                break
            self.records.setdefault(str(found["task"]), []).append(_RECORD.validate_python(found))
            num_whole += 1
        whole = [line + b"\n" for line in lines[:num_whole]]
        if sum(map(len, whole)) != len(content):
            write_file(path, whole)


class HarnessFile:
    """The numbers of the harness's tasks that are done, in a file of JSON, or in memory alone."""

    def __init__(self, path: Path | None, question: Question) -> None:
        """Open the file where there is one. Raises InputRefused where it answers another question."""
        self.path, self.question = path, dict(question)
        self.results: dict[str, TaskNumbers] = {}
        if path is not None and path.is_file():
            content = path.read_bytes()
            _refuse_other(path, content, self.question)
            self.results = json.loads(content)["results"]

    def add(self, task: str, numbers: TaskNumbers) -> None:
        """Take a finished task's numbers; a group of tasks brings those of each."""
        self.results[task] = numbers
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"asked": self.question, "results": self.results})


def _refuse_other(path: Path, head: bytes, question: Question) -> None:
    before = (_parsed(head) or {}).get("asked")
    if not isinstance(before, dict):
        raise InputRefused(f"--out: '{path}' is not a file of answers; name another")
    changed = [name for name, value in question.items() if before.get(name) != value]
    if changed:
        raise InputRefused(
            f"--out: '{path}' holds answers to another question ({', '.join(changed)} changed); name another file, "
            "or remove that one"
        )


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


__all__ = ["AnswerFile", "HarnessFile", "TaskNumbers", "digest"]
