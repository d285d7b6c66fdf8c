"""Answers that outlive a kill: a finished batch is a few lines on disk, under a first line that says what was asked.

A start with the same question goes on; one with another is refused by name, so that scores never mix two models.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qd2mora.disk.durable import write_file, write_json
from qd2mora.errors import InputRefused
from qd2mora.evaluation.score import Record


class KeptAnswers:
    """The records of an evaluation, by task; appends to `path`, or keeps nothing where there is none."""

    def __init__(self, path: Path | None, asked: Mapping[str, Any]) -> None:
        """Open or begin the file. Raises InputRefused where it answers another question."""
        self.path = path
        self.records: dict[str, list[Record]] = {}
        if path is None:
            return
        head = {"asked": dict(asked)}
        if path.is_file():
            self._read(path, head)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, [_line(head)])

    def add(self, task: str, records: list[Record]) -> None:
        """Keep a finished batch, and force it to disk."""
        self.records.setdefault(task, []).extend(records)
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write(b"".join(_line({"task": task, **asdict(record)}) for record in records))
                file.flush()
                os.fsync(file.fileno())

    def _read(self, path: Path, head: dict[str, Any]) -> None:
        whole = path.read_bytes()
        lines = whole[: whole.rfind(b"\n") + 1].splitlines()
        _refuse_other(path, (_parsed(lines[0]) or {}).get("asked") if lines else None, head["asked"])
        kept = [lines[0]]
        for line in lines[1:]:
            content = _parsed(line)
            if content is None:
                break
            self.records.setdefault(content.pop("task"), []).append(Record(**content))
            kept.append(line)
        if len(b"\n".join(kept)) + 1 != len(whole):  # a kill cut the last line short
            write_file(path, [line + b"\n" for line in kept])


class KeptTasks:
    """The numbers of whole tasks that are done, in a file of JSON; nothing is kept where there is none."""

    def __init__(self, path: Path | None, asked: Mapping[str, Any]) -> None:
        """Open the file where there is one. Raises InputRefused where it answers another question."""
        self.path, self.asked = path, dict(asked)
        self.results: dict[str, dict[str, Any]] = {}
        if path is not None and path.is_file():
            before = _parsed(path.read_bytes()) or {}
            _refuse_other(path, before.get("asked"), self.asked)
            self.results = before["results"]

    def add(self, task: str, numbers: dict[str, Any]) -> None:
        """Keep a finished task."""
        self.results[task] = numbers
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"asked": self.asked, "results": self.results})


def _refuse_other(path: Path, before: Any, asked: Mapping[str, Any]) -> None:
    if not isinstance(before, dict):
        raise InputRefused(f"--out: '{path}' is not a file of answers; name another")
    changed = [name for name, value in asked.items() if before.get(name) != value]
    if changed:
        raise InputRefused(
            f"--out: '{path}' holds answers to another question ({', '.join(changed)} changed); name another file, "
            "or remove that one"
        )


def digest(content: Any) -> str:
    """Return a hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


__all__ = ["KeptAnswers", "KeptTasks", "digest"]
