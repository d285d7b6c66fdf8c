"""Rows of a task as text, checked: a row that cannot be learned from stops the run, or is left out and counted."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qd2mora.data.answered import answered
from qd2mora.data.chat_template import ChatTemplate
from qd2mora.data.conversation import as_conversation, read_conversation, with_system
from qd2mora.data.file_rows import BadRow, Repeated, rows_of
from qd2mora.data.formats import find_format
from qd2mora.data.pair import Pair, Vector
from qd2mora.data.row_format import Fields, Names, RowFormat
from qd2mora.data.row_keys import unread_keys
from qd2mora.data.row_text import check_text, shortened
from qd2mora.data.spans import KEY, joined, read_spans
from qd2mora.data.turns import Turns
from qd2mora.disk.file_hash import hash_of_bytes, hash_of_file
from qd2mora.errors import InputRefused
from qd2mora.recipe import Task
from qd2mora.recipe.data import HUB

_WITH_SPANS = ("completion", "chat")
_SYSTEM = "bring their system message in field 'system'; it is put first"


@dataclass
class Skipped:
    """Rows that were left out: the places of each reason, and how many rows were kept twice."""

    places: dict[str, list[str]] = field(default_factory=dict)
    duplicates: int = 0
    """Rows kept that say what an earlier one says."""
    unread: dict[str, int] = field(default_factory=dict)
    """Rows kept that have a key which nothing reads, by key."""
    remarks: dict[str, int] = field(default_factory=dict)
    """Rows kept of which there is something to say, by what that is."""

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
        for remark, number in other.remarks.items():
            self.remarks[remark] = self.remarks.get(remark, 0) + number

    def note(self, unread: Iterable[str], remarks: Iterable[str]) -> None:
        """Count a row that is kept."""
        for counts, names in ((self.unread, unread), (self.remarks, remarks)):
            for name in names:
                counts[name] = counts.get(name, 0) + 1

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
    spans: Sequence[str] | None = None,
) -> Iterator[Pair]:
    """Yield what `read_pairs` returns, row by row; `noted` is told what one would not expect of rows that are kept.

    spans: names of the adapters that rows may mark spans with.
    """
    reading, noted = _Reading(task, template, spans), noted or Skipped()
    number = 0
    for place, row in selected_rows(task, path):
        if number == task.limit:
            break
        try:
            made = reading.made_of(row)
        except BadRow as error:
            if skipped is None:
                raise InputRefused(f"{path}, {place}: {error}") from error
            skipped.places.setdefault(error.reason, []).append(f"{path}, {place}")
            continue
        number += 1
        noted.note(made.unread, made.remarks)
        for place_of_pair, pair in enumerate(made.pairs):
            yield replace(pair, continues=True) if place_of_pair else pair
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


def selected_rows(task: Task, path: str) -> Iterator[tuple[str, object]]:
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


@dataclass(frozen=True)
class _Made:
    """What a row of a file became, the keys of it that nothing reads, and what one would not expect of it."""

    pairs: list[Pair]
    unread: list[str]
    remarks: list[str]


class _Reading:
    """How the rows of a task are read."""

    def __init__(self, task: Task, template: ChatTemplate | None, spans: Sequence[str] | None) -> None:
        self.row_format, self.task, self.names = find_format(task), task, task.fields or {}
        self.spans = spans
        if spans is not None and task.format not in _WITH_SPANS:
            raise InputRefused(
                f"data.spans: spans are read of {' and '.join(_WITH_SPANS)} rows; those of task {task.name} are "
                f"{task.format}"
            )
        self.turns = None
        if template is not None:
            # Of answers that are judged the last message alone is learned.
            self.turns = Turns(template, "last" if self.row_format.answers else task.turns)

    def made_of(self, row: object) -> _Made:
        """Return what a row becomes. Raises BadRow."""
        fields = _mapping(row, self.row_format)
        content = _fields_of(self.row_format, fields, self.names)
        _check_fields(self.row_format, content, self.names)
        remarks, unread = [], self._unread(fields)
        if content.get("system"):
            remarks.append(_SYSTEM)
        if self.row_format.answers:
            pairs, said, of_messages = answered(self.row_format, content, self.names, self.turns)
            unread += of_messages
            remarks += said
        elif self.row_format.split is None:
            pairs, said, of_messages = self._conversation(content, fields)
            place = self.row_format.called("messages", fields, self.names)
            unread += [f"{place}.{key}" for key in of_messages]
            remarks += said
        else:
            pairs = [self._pair(content)]
            if self.spans is not None:
                texts = {str(self.names.get(name, name)): content[name] for name in self.row_format.fields}
                spans = read_spans(fields.get(KEY), self.spans, texts)
                pairs = [replace(pairs[0], spans=joined(spans, texts))]
        if self.task.vector is not None:
            vector = _vector(fields, self.task.vector)
            pairs = [replace(pair, vector=vector) for pair in pairs]
        return _Made(pairs, unread, remarks)

    def _conversation(self, content: Fields, fields: Fields) -> tuple[list[Pair], list[str], tuple[str, ...]]:
        assert self.turns is not None
        called = {ours: theirs for ours, theirs in self.names.items() if isinstance(theirs, str)}
        talk = read_conversation(content | {"system": None}, called)
        if self.spans is not None:
            # By the numbers that the row's own messages have, before a system message is put first.
            texts = {number: str(message.get("content", "")) for number, message in enumerate(talk.messages)}
            talk = replace(talk, spans=tuple(read_spans(fields.get(KEY), self.spans, texts)))
        talk = with_system(talk, content.get("system"))
        pairs, remarks = self.turns.pairs(talk)
        return pairs, [*talk.remarks, *remarks], talk.unread

    def _pair(self, content: Fields) -> Pair:
        row_format = self.row_format
        if self.turns is not None:
            _refuse_silent(content["output"], row_format, self.names)
            ((pair,), _) = self.turns.pairs(as_conversation(content))
            return replace(pair, answer=content["output"])
        assert row_format.split is not None
        prompt, answer = row_format.split(content)
        if row_format.texts != row_format.fields:
            for text in (prompt, answer):
                check_text("choices", text)
        _refuse_silent(answer, row_format, self.names)
        return Pair(prompt, answer, starts_word=row_format.starts_word, is_document=row_format.is_document)

    def _unread(self, row: Fields) -> list[str]:
        """Return the keys of a row that nothing reads. Raises BadRow where one changes what is learned."""
        read = {*(self.task.select or {}), *([self.task.vector] if self.task.vector else [])}
        if self.spans is not None:
            read.add(KEY)
        for name in (*self.row_format.fields, *self.row_format.optional):
            theirs = self.row_format.called(name, row, self.names)
            read.update(theirs if isinstance(theirs, list) else [theirs])
        return unread_keys(row, read)


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
        raise BadRow("a row is an object", f" with {', '.join(row_format.fields)}, this is {shortened(row)}")
    return row


def _check_fields(row_format: RowFormat, fields: Fields, names: Names) -> None:
    for name in (*row_format.texts, *row_format.optional):
        if (fields.get(name) is not None or name in row_format.texts) and name not in row_format.built:
            check_text(str(names.get(name, name)), fields[name])
    if row_format.asks and not any((fields.get(name) or "").strip() for name in row_format.asks):
        first = row_format.asks[0]
        raise BadRow(f"field '{names.get(first, first)}' is empty", ", there is nothing to ask")


def _fields_of(row_format: RowFormat, row: Fields, names: Names) -> Fields:
    """Return a row's fields under our names. Raises BadRow where one is missing."""
    content: Fields = {}
    for name in (*row_format.fields, *row_format.optional):
        theirs = row_format.called(name, row, names)
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


def _vector(row: Fields, name: str) -> Vector:
    value = row.get(name)
    numbers = value if isinstance(value, list) else list(getattr(value, "tolist", list)())
    if not numbers or not all(isinstance(each, int | float) and math.isfinite(each) for each in numbers):
        raise BadRow(f"field {name!r} should be a list of numbers", f", it is {shortened(value)}")
    return tuple(map(float, numbers))


__all__ = ["Pair", "Skipped", "content_hash", "iterate_pairs", "read_pairs", "selected_rows"]
