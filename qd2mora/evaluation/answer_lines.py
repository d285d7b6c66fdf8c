"""Answers to a file of prompts that outlive a kill: a line each, under a first line that says what was asked."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from qd2mora.disk.durable import write_bytes_atomically
from qd2mora.disk.file_hash import hash_of_bytes
from qd2mora.errors import InputRefused

_HASH = "sha256"


class AnswerLines:
    """Lines of answers by the number of their row; appends to `path`.

    Each line carries a hash of itself: one that a kill cut short, or somebody changed, is asked again.
    """

    def __init__(self, path: Path, asked: Mapping[str, object]) -> None:
        """Open or begin the file. Raises InputRefused where it answers another question."""
        self.path = path
        self._lines: dict[int, bytes] = {}
        head = _sealed({"asked": dict(asked)})
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        if lines and lines[0] != head:
            before = (_unsealed(lines[0]) or {}).get("asked")
            changed = [name for name, value in asked.items() if isinstance(before, dict) and before.get(name) != value]
            what = ", ".join(changed) or "its first line is not as it was written"
            raise InputRefused(
                f"--out: '{path}' holds answers to another question ({what}); remove it, or name another file"
            )
        for line in lines[1:]:
            content = _unsealed(line)
            if content is not None and isinstance(content.get("row"), int):
                self._take(content)
        whole = [head, *(_sealed(json.loads(line)) for line in self._lines.values())]
        write_bytes_atomically(path, b"".join(whole))

    def __contains__(self, number: int) -> bool:
        return number in self._lines

    def of(self, number: int) -> bytes:
        """Return the line of a row, as it stands in the finished file."""
        return self._lines[number]

    def add(self, answers: Sequence[Mapping[str, object]]) -> None:
        """Take a finished batch, and force it to disk."""
        with self.path.open("ab") as file:
            file.write(b"".join(_sealed(each) for each in answers))
            file.flush()
            os.fsync(file.fileno())
        for each in answers:
            self._take(each)

    def _take(self, content: Mapping[str, object]) -> None:
        number = content["row"]
        assert isinstance(number, int)
        self._lines[number] = _line(content)


def _line(content: Mapping[str, object]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _sealed(content: Mapping[str, object]) -> bytes:
    return _line({**content, _HASH: hash_of_bytes(_line(content))})


def _unsealed(line: bytes) -> dict[str, object] | None:
    """Return what a whole line says; None where it is none."""
    try:
        content = json.loads(line)
    except ValueError:
        return None
    if not isinstance(content, dict):
        return None
    seal = content.pop(_HASH, None)
    return content if seal == hash_of_bytes(_line(content)) else None


__all__ = ["AnswerLines"]
