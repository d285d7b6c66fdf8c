"""Rows of a task as text, checked: a row that cannot be learned from stops the run, or is left out and counted."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qd2mora.data import chat
from qd2mora.data.chat_template import ChatTemplate
from qd2mora.data.file_rows import MAX_ROW_BYTES, BadRow, Repeated, rows_of
from qd2mora.data.formats import find_format
from qd2mora.data.pair import Pair, Vector
from qd2mora.data.row_format import Fields, RowFormat
from qd2mora.data.row_keys import unread_keys, unread_keys_of_message
from qd2mora.disk.file_hash import hash_of_bytes, hash_of_file
from qd2mora.errors import InputRefused
from qd2mora.recipe import Task
from qd2mora.recipe.data import HUB

Names = Mapping[str, str | list[str]]
"""What a file calls a format's fields."""


@dataclass
class Skipped:
    """Rows that were left out: the places of each reason, and how many rows were kept twice."""

    places: dict[str, list[str]] = field(default_factory=dict)
    duplicates: int = 0
    """Rows kept that say what an earlier one says."""
    unread: dict[str, int] = field(default_factory=dict)
    """Rows kept that have a key which nothing reads, by key."""
    systems: int = 0
    """Rows kept whose system message is a field of the row."""

    @property
    def total(self) -> int:
        return sum(len(places) for places in self.places.values())

    @property
    def counts(self) -> dict[str, int]:
        """Rows left out, by reason."""
        return {reason: len(places) for reason, places in self.places.items()}

    def add(self, other: "Skipped") -> None:
        """Take in what was left out of another file, but for rows said twice."""
        for reason, places in other.places.items():
            self.places.setdefault(reason, []).extend(places)
        for key, number in other.unread.items():
            self.unread[key] = self.unread.get(key, 0) + number
        self.systems += other.systems

    def line(self) -> str:
        """Say in one line what was left out, with the first places of each reason."""
        parts = []
        for reason, places in self.places.items():
            shown = places[:3]
            if len(places) > 3:
                shown = [*shown, "..."]
            parts.append(f"{len(places)} {reason} ({', '.join(shown)})")
        return f"{self.total} rows left out: {'; '.join(parts)}"


def read_pairs(
    task: Task, path: str, skipped: Skipped | None = None, template: ChatTemplate | None = None
) -> list[Pair]:
    """Return the rows of a data file in order: what `task.select` wants, the first `task.limit` of it.

    Where `skipped` is given, a bad row is left out and noted there; else it raises InputRefused with file and row.
    """
    return list(iterate_pairs(task, path, skipped, template))


def iterate_pairs(
    task: Task,
    path: str,
    skipped: Skipped | None = None,
    template: ChatTemplate | None = None,
    noted: Skipped | None = None,
) -> Iterator[Pair]:
    """Yield what `read_pairs` returns, row by row; `noted` is told of keys that nothing reads."""
    row_format, noted = find_format(task), noted or Skipped()
    number = 0
    for place, row in _selected(task, path):
        if number == task.limit:
            break
        try:
            pair = _pair_of(row_format, row, task, template)
            unread = _unread(row_format, _mapping(row, row_format), task)
        except BadRow as error:
            if skipped is None:
                raise InputRefused(f"{path}, {place}: {error}") from error
            skipped.places.setdefault(error.reason, []).append(f"{path}, {place}")
            continue
        number += 1
        for name in unread:
            noted.unread[name] = noted.unread.get(name, 0) + 1
        noted.systems += _has_system(row_format, _mapping(row, row_format), task)
        yield pair
    if not number:
        problem = f"{path}: no rows for task '{task.name}'"
        if task.select:
            problem = f"{path}: no rows with {task.select} for task '{task.name}'"
        if skipped and skipped.total:
            problem += f"; {skipped.line()}"
        raise InputRefused(problem)


def content_hash(path: str) -> str:
    """Return the SHA-256 of a data file, or of the name of a hub data set."""
    if path.startswith(HUB):
        return hash_of_bytes(path.encode())
    return hash_of_file(Path(path))


def _selected(task: Task, path: str) -> Iterator[tuple[str, object]]:
    """Yield the rows whose fields have the values asked for, and whatever is no row at all."""
    wanted = task.select or {}
    seen: set[str] = set()
    has_rows = False
    for place, row in rows_of(path, task):
        has_rows = True
        if isinstance(row, dict):
            seen |= row.keys() & wanted.keys()
            # As texts: a recipe's values are texts, and a file may hold a number or a truth value.
            if any(str(row.get(name)) != value for name, value in wanted.items()):
                continue
        yield place, row
    for name in wanted:
        if has_rows and name not in seen:
            raise InputRefused(f"data.tasks.{task.name}.select: rows of {path} have no field {name!r}")


def _pair_of(row_format: RowFormat, row: object, task: Task, template: ChatTemplate | None) -> Pair:
    """Return a row as text. Raises BadRow."""
    names = task.fields or {}
    fields = _fields_of(row_format, _mapping(row, row_format), names)
    _check_fields(row_format, fields, names)
    vector = None
    if task.vector is not None:
        vector = _vector(_mapping(row, row_format), task.vector)
    if row_format.split is None:
        return _conversation(fields, names, template, vector)
    if template is not None:
        _refuse_silent(fields["output"], row_format, names)
        parts = chat.segments_of_instruction(fields, template)
        return Pair("".join(parts[:-1]), fields["output"], vector, parts)
    prompt, answer = row_format.split(fields)
    if row_format.texts != row_format.fields:
        for text in (prompt, answer):
            _check_text("choices", text)
    _refuse_silent(answer, row_format, names)
    return Pair(prompt, answer, vector, starts_word=row_format.starts_word, is_document=row_format.is_document)


def _refuse_silent(answer: str, row_format: RowFormat, names: Names) -> None:
    if not answer.strip():
        name = row_format.fields[-1]
        raise BadRow(f"field '{names.get(name, name)}' is empty", ", there is nothing to learn")


def _mapping(row: object, row_format: RowFormat) -> Fields:
    """Return what is an object in the file. Raises BadRow where it is none, or was none to the reader."""
    if isinstance(row, BadRow):
        raise row
    if isinstance(row, Repeated):
        raise BadRow("a key is given twice", f": {row.key[:40]!r}")
    if not isinstance(row, dict):
        raise BadRow("a row is an object", f" with {', '.join(row_format.fields)}, this is {_short(row)}")
    return row


def _check_fields(row_format: RowFormat, fields: Fields, names: Names) -> None:
    for name in (*row_format.texts, *row_format.optional):
        if fields.get(name) is not None or name in row_format.texts:
            _check_text(str(names.get(name, name)), fields[name])
    if row_format.asks and not any((fields.get(name) or "").strip() for name in row_format.asks):
        first = row_format.asks[0]
        raise BadRow(f"field '{names.get(first, first)}' is empty", ", there is nothing to ask")


def _fields_of(row_format: RowFormat, row: Fields, names: Names) -> Fields:
    """Return a row's fields under our names. Raises BadRow where one is missing."""
    content: Fields = {}
    for name in (*row_format.fields, *row_format.optional):
        theirs = names.get(name, name)
        if isinstance(theirs, list):
            _refuse_missing(theirs, row)
            content[name] = [row[each] for each in theirs]
        else:
            if name in row_format.fields:
                _refuse_missing([theirs], row)
            content[name] = row.get(theirs)
    return content


def _refuse_missing(names: list[str], row: Fields) -> None:
    for name in names:
        if name not in row:
            raise BadRow(f"no field '{name}'", f"; the row has {', '.join(map(repr, row))[:200] or 'no fields'}")


def _conversation(
    fields: Fields,
    names: Names,
    template: ChatTemplate | None,
    vector: Vector | None,
) -> Pair:
    assert template is not None
    called = {ours: theirs for ours, theirs in names.items() if isinstance(theirs, str)}
    found = chat.with_system(chat.check(fields["messages"], called), fields.get("system"))
    for message in found:
        _check_text("content", message["content"])
    parts = chat.segments(found, template)
    answer = next(message["content"] for message in reversed(found) if message["role"] == "assistant")
    return Pair("".join(parts[:-1]), answer, vector, parts)


def _unread(row_format: RowFormat, row: Fields, task: Task) -> list[str]:
    """Return the keys of a good row that nothing reads, `messages.KEY` those of its messages. Raises BadRow."""
    names = task.fields or {}
    read = {*(task.select or {}), *([task.vector] if task.vector else [])}
    for name in (*row_format.fields, *row_format.optional):
        theirs = names.get(name, name)
        read.update(theirs if isinstance(theirs, list) else [theirs])
    unread = unread_keys(row, read)
    if row_format.split is None:
        place = str(names.get("messages", "messages"))
        inner = [str(names.get(name, name)) for name in row_format.inner]
        keys = dict.fromkeys(key for message in row[place] for key in unread_keys_of_message(message, inner))
        unread += [f"{place}.{key}" for key in keys]
    return unread


def _has_system(row_format: RowFormat, row: Fields, task: Task) -> bool:
    name = (task.fields or {}).get("system", "system")
    return "system" in row_format.optional and isinstance(name, str) and bool(row.get(name))


def _vector(row: Fields, name: str) -> Vector:
    value = row.get(name)
    numbers = value if isinstance(value, list) else list(getattr(value, "tolist", list)())
    if not numbers or not all(isinstance(each, int | float) and math.isfinite(each) for each in numbers):
        raise BadRow(f"field {name!r} should be a list of numbers", f", it is {_short(value)}")
    return tuple(map(float, numbers))


def _check_text(name: str, value: object) -> None:
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


def _short(value: object) -> str:
    kind = type(value).__name__
    # A container may be nested deeper than repr goes.
    if isinstance(value, dict | list | Repeated):
        return kind
    return f"{kind} {repr(value)[:40]}"


__all__ = ["Skipped", "content_hash", "iterate_pairs", "read_pairs"]
