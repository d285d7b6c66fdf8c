"""Rows of a task as text, checked: a row that cannot be learned from stops the run, or is left out and counted."""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qd2mora.data import completion, instruction
from qd2mora.data.rows import HUB, MAX_ROW_BYTES, BadRow, Repeated, rows_of
from qd2mora.errors import InputRefused, nearest
from qd2mora.recipe import Task


@dataclass(frozen=True)
class Format:
    """How a row becomes a prompt and an answer."""

    fields: tuple[str, ...]
    optional: tuple[str, ...]
    split: Callable[[dict[str, Any]], tuple[str, str]]


FORMATS = {
    "instruction": Format(instruction.FIELDS, instruction.OPTIONAL, instruction.split),
    "completion": Format(completion.FIELDS, (), completion.split),
}


@dataclass(frozen=True)
class Pair:
    """One example as text."""

    prompt: str
    answer: str
    vector: tuple[float, ...] | None = None


@dataclass
class Skipped:
    """Rows that were left out: the places of each reason, and how many rows were kept twice."""

    places: dict[str, list[str]] = field(default_factory=dict)
    duplicates: int = 0
    """Rows kept that say what an earlier one says."""

    @property
    def total(self) -> int:
        return sum(len(places) for places in self.places.values())

    @property
    def counts(self) -> dict[str, int]:
        """Rows left out, by reason."""
        return {reason: len(places) for reason, places in self.places.items()}

    def line(self) -> str:
        """Say in one line what was left out, with the first places of each reason."""
        parts = []
        for reason, places in self.places.items():
            more = ", ..." if len(places) > 3 else ""
            parts.append(f"{len(places)} {reason} ({', '.join(places[:3])}{more})")
        return f"{self.total} rows left out: {'; '.join(parts)}"


def find_format(task: Task) -> Format:
    """Return the task's format. Raises InputRefused naming the nearest one."""
    if task.format not in FORMATS:
        known = nearest(task.format, FORMATS)
        raise InputRefused(f"data.tasks.{task.name}.format: unknown format {task.format!r}; {known}")
    return FORMATS[task.format]


def read_pairs(task: Task, path: str, skipped: Skipped | None = None) -> list[Pair]:
    """Read and check the rows of `path` as the task's format, up to the task's limit.

    Where `skipped` is given, a bad row is left out and noted there; else it raises InputRefused with file and row.
    """
    form = find_format(task)
    pairs: list[Pair] = []
    for place, row in _selected(task, path):
        if len(pairs) == task.limit:
            break
        try:
            pairs.append(_checked(form, row, task.vector))
        except BadRow as error:
            if skipped is None:
                raise InputRefused(f"{path}, {place}: {error}") from error
            skipped.places.setdefault(error.reason, []).append(f"{path}, {place}")
    if not pairs:
        wanted = f" with {task.select}" if task.select else ""
        left_out = f"; {skipped.line()}" if skipped and skipped.total else ""
        raise InputRefused(f"{path}: no rows{wanted} for task '{task.name}'{left_out}")
    return pairs


def content_hash(path: str) -> str:
    """Return the SHA-256 of a data file, or of the name of a hub data set."""
    if path.startswith(HUB):
        return hashlib.sha256(path.encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _selected(task: Task, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows whose fields have the values asked for, and whatever is no row at all."""
    wanted = task.select or {}
    seen: set[str] = set()
    has_rows = False
    for place, row in rows_of(path, task):
        has_rows = True
        if isinstance(row, dict):
            seen |= row.keys() & wanted.keys()
            if any(str(row.get(name)) != value for name, value in wanted.items()):
                continue
        yield place, row
    for name in wanted:
        if has_rows and name not in seen:
            raise InputRefused(f"data.tasks.{task.name}.select: rows of {path} have no field {name!r}")


def _checked(form: Format, row: Any, vector: str | None = None) -> Pair:
    """Return a row as text. Raises BadRow."""
    if isinstance(row, BadRow):
        raise row
    if isinstance(row, Repeated):
        raise BadRow("a key is given twice", f": {row.key[:40]!r}")
    if not isinstance(row, dict):
        raise BadRow("a row is an object", f" with {', '.join(form.fields)}, this is {_short(row)}")
    for name in form.fields:
        if name not in row:
            raise BadRow(f"no field '{name}'", f"; the row has {', '.join(map(repr, row))[:200] or 'no fields'}")
    for name in (*form.fields, *form.optional):
        if row.get(name) is not None or name in form.fields:
            _check_text(name, row[name])
    prompt, answer = form.split(row)
    if not answer.strip():
        raise BadRow(f"field '{form.fields[-1]}' is empty", ", there is nothing to learn")
    return Pair(prompt, answer, None if vector is None else _vector(row, vector))


def _vector(row: dict[str, Any], name: str) -> tuple[float, ...]:
    value = row.get(name)
    numbers = value if isinstance(value, list) else list(getattr(value, "tolist", list)())
    if not numbers or not all(isinstance(each, int | float) and math.isfinite(each) for each in numbers):
        raise BadRow(f"field {name!r} should be a list of numbers", f", it is {_short(value)}")
    return tuple(map(float, numbers))


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise BadRow(f"field '{name}' should be text", f", it is {_short(value)}")
    if len(value) > MAX_ROW_BYTES:
        raise BadRow(f"field '{name}' is longer than {MAX_ROW_BYTES} characters")
    if "\0" in value:
        raise BadRow(f"field '{name}' holds a NUL character")
    if not value.isascii():
        surrogates = [letter for letter in value if "\ud800" <= letter <= "\udfff"]
        if surrogates and all("\udc80" <= letter <= "\udcff" for letter in surrogates):
            raise BadRow(f"field '{name}' is not UTF-8", "; save it as UTF-8")
        if surrogates:
            raise BadRow(f"field '{name}' holds half a character", " (a lone surrogate), which is no text")


def _short(value: Any) -> str:
    kind = type(value).__name__
    # A container may be nested deeper than repr goes.
    text = "" if isinstance(value, dict | list | Repeated) else f" {repr(value)[:40]}"
    return f"{kind}{text}"


__all__ = ["FORMATS", "Format", "Pair", "Skipped", "content_hash", "find_format", "read_pairs"]
