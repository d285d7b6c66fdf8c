"""Rows of a task as text, checked: a row that cannot be learned from stops the run, or is left out and counted."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qd2mora.data import chat, completion, instruction, multiple_choice
from qd2mora.data.rows import HUB, MAX_ROW_BYTES, BadRow, Repeated, rows_of
from qd2mora.data.template import ChatTemplate
from qd2mora.disk.file_hash import hash_of_bytes, hash_of_file
from qd2mora.errors import InputRefused, nearest
from qd2mora.recipe import Task


@dataclass(frozen=True)
class Format:
    """How a row becomes a prompt and an answer; `split` is None where a chat template words it.

    `texts`: the fields that are text; `split` checks the others. `asks`: fields of which one must say something.
    `inner`: names inside a field that a recipe may map.
    """

    fields: tuple[str, ...]
    split: Callable[[dict[str, Any]], tuple[str, str]] | None
    texts: tuple[str, ...]
    optional: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()


FORMATS = {
    "instruction": Format(
        *(instruction.FIELDS, instruction.split, instruction.FIELDS, instruction.OPTIONAL),
        asks=("instruction", "input"),
    ),
    "completion": Format(completion.FIELDS, completion.split, completion.FIELDS),
    "multiple_choice": Format(
        multiple_choice.FIELDS, multiple_choice.split, multiple_choice.TEXTS, asks=multiple_choice.TEXTS
    ),
    "chat": Format(chat.FIELDS, None, (), (), chat.INNER),
}


@dataclass(frozen=True)
class Pair:
    """One example as text.

    `segments`: a conversation whole, given and learned in turn, special tokens in it; `prompt` is all of it before the
    last answer.
    """

    prompt: str
    answer: str
    vector: tuple[float, ...] | None = None
    segments: tuple[str, ...] = ()


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
    """Return the task's format. Raises InputRefused naming the nearest one, or a mapped field that it has not."""
    if task.format not in FORMATS:
        known = nearest(task.format, FORMATS)
        raise InputRefused(f"data.tasks.{task.name}.format: unknown format {task.format!r}; {known}")
    form = FORMATS[task.format]
    names = (*form.fields, *form.optional, *form.inner)
    for name in task.fields or {}:
        if name not in names:
            raise InputRefused(
                f"data.tasks.{task.name}.fields: {task.format} rows have no field {name!r}; {nearest(name, names)}"
            )
    return form


def read_pairs(
    task: Task, path: str, skipped: Skipped | None = None, template: ChatTemplate | None = None
) -> list[Pair]:
    """Return the rows of a data file in order: what `task.select` wants, the first `task.limit` of it.

    Where `skipped` is given, a bad row is left out and noted there; else it raises InputRefused with file and row.
    """
    return list(iterate_pairs(task, path, skipped, template))


def iterate_pairs(
    task: Task, path: str, skipped: Skipped | None = None, template: ChatTemplate | None = None
) -> Iterator[Pair]:
    """Yield what `read_pairs` returns, row by row."""
    form = find_format(task)
    number = 0
    for place, row in _selected(task, path):
        if number == task.limit:
            break
        try:
            pair = _checked(form, row, task, template)
        except BadRow as error:
            if skipped is None:
                raise InputRefused(f"{path}, {place}: {error}") from error
            skipped.places.setdefault(error.reason, []).append(f"{path}, {place}")
            continue
        number += 1
        yield pair
    if not number:
        wanted = f" with {task.select}" if task.select else ""
        left_out = f"; {skipped.line()}" if skipped and skipped.total else ""
        raise InputRefused(f"{path}: no rows{wanted} for task '{task.name}'{left_out}")


def content_hash(path: str) -> str:
    """Return the SHA-256 of a data file, or of the name of a hub data set."""
    if path.startswith(HUB):
        return hash_of_bytes(path.encode())
    return hash_of_file(Path(path))


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


def _checked(form: Format, row: Any, task: Task, template: ChatTemplate | None) -> Pair:
    """Return a row as text. Raises BadRow."""
    if isinstance(row, BadRow):
        raise row
    if isinstance(row, Repeated):
        raise BadRow("a key is given twice", f": {row.key[:40]!r}")
    if not isinstance(row, dict):
        raise BadRow("a row is an object", f" with {', '.join(form.fields)}, this is {_short(row)}")
    names = task.fields or {}
    content = _mapped(form, row, names)
    for name in (*form.texts, *form.optional):
        if content.get(name) is not None or name in form.texts:
            _check_text(str(names.get(name, name)), content[name])
    if form.asks and not any((content.get(name) or "").strip() for name in form.asks):
        raise BadRow(f"field '{names.get(form.asks[0], form.asks[0])}' is empty", ", there is nothing to ask")
    vector = None if task.vector is None else _vector(row, task.vector)
    if form.split is None:
        return _conversation(content["messages"], names, template, vector)
    prompt, answer = form.split(content)
    for text in (prompt, answer) if form.texts != form.fields else ():
        _check_text("choices", text)
    if not answer.strip():
        name = form.fields[-1]
        raise BadRow(f"field '{names.get(name, name)}' is empty", ", there is nothing to learn")
    return Pair(prompt, answer, vector)


def _mapped(form: Format, row: dict[str, Any], names: Mapping[str, str | list[str]]) -> dict[str, Any]:
    """Return a row's fields under our names. Raises BadRow where one is missing."""
    content = {}
    for name in (*form.fields, *form.optional):
        theirs = names.get(name, name)
        for each in [theirs] if isinstance(theirs, str) else theirs:
            if each not in row and (name in form.fields or isinstance(theirs, list)):
                raise BadRow(f"no field '{each}'", f"; the row has {', '.join(map(repr, row))[:200] or 'no fields'}")
        content[name] = row.get(theirs) if isinstance(theirs, str) else [row[each] for each in theirs]
    return content


def _conversation(
    messages: Any, names: Mapping[str, str | list[str]], template: ChatTemplate | None, vector: tuple[float, ...] | None
) -> Pair:
    assert template is not None
    found = chat.check(messages, {ours: theirs for ours, theirs in names.items() if isinstance(theirs, str)})
    for message in found:
        _check_text("content", message["content"])
    parts = chat.segments(found, template)
    answer = next(message["content"] for message in reversed(found) if message["role"] == "assistant")
    return Pair("".join(parts[:-1]), answer, vector, parts)


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


__all__ = ["FORMATS", "Format", "Pair", "Skipped", "content_hash", "find_format", "iterate_pairs", "read_pairs"]
