"""Rows of a task, read from a file or a hub data set and checked; every refusal names the file and the row."""

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qd2mora.data import completion, instruction
from qd2mora.errors import InputRefused, nearest
from qd2mora.recipe import Task

HUB = "hub:"


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


def find_format(task: Task) -> Format:
    """Return the task's format. Raises InputRefused naming the nearest one."""
    if task.format not in FORMATS:
        known = nearest(task.format, FORMATS)
        raise InputRefused(f"data.tasks.{task.name}.format: unknown format {task.format!r}; {known}")
    return FORMATS[task.format]


def read_pairs(task: Task, path: str) -> list[Pair]:
    """Read and check all rows of `path` as the task's format. Raises InputRefused with file and row."""
    form = find_format(task)
    rows = _read_rows(path, task)
    for field in task.select or {}:
        if rows and not any(isinstance(row, dict) and field in row for row in rows):
            raise InputRefused(f"data.tasks.{task.name}.select: rows of {path} have no field {field!r}")
    chosen = [
        (number, row)
        for number, row in enumerate(rows, 1)
        # A row that is no object is kept here, and refused below by its number.
        if not isinstance(row, dict)
        or all(str(row.get(field)) == value for field, value in (task.select or {}).items())
    ]
    if not chosen:
        wanted = f" with {task.select}" if task.select else ""
        raise InputRefused(f"{path}: no rows{wanted} for task '{task.name}'")
    return [_checked(form, row, f"{path}, row {number}", task.vector) for number, row in chosen[: task.limit]]


def content_hash(path: str) -> str:
    """Return the SHA-256 of a data file, or of the name of a hub data set."""
    if path.startswith(HUB):
        return hashlib.sha256(path.encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(form: Format, row: Any, where: str, vector: str | None = None) -> Pair:
    if not isinstance(row, dict):
        raise InputRefused(f"{where}: a row is an object with {', '.join(form.fields)}, this is {_short(row)}")
    for field in form.fields:
        if field not in row:
            raise InputRefused(f"{where}: no field '{field}'; the row has {', '.join(map(repr, row)) or 'no fields'}")
    for field in (*form.fields, *form.optional):
        value = row.get(field)
        if value is None and field in form.optional:
            continue
        if not isinstance(value, str):
            raise InputRefused(f"{where}: field '{field}' should be text, it is {_short(value)}")
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise InputRefused(f"{where}: field '{field}' holds half a character (a lone surrogate), which is no text")
    prompt, answer = form.split(row)
    if not answer.strip():
        raise InputRefused(f"{where}: field '{form.fields[-1]}' is empty, there is nothing to learn")
    return Pair(prompt, answer, None if vector is None else _vector(row, vector, where))


def _vector(row: dict[str, Any], field: str, where: str) -> tuple[float, ...]:
    value = row.get(field)
    numbers = value if isinstance(value, list) else list(getattr(value, "tolist", list)())
    if not numbers or not all(isinstance(each, int | float) and math.isfinite(each) for each in numbers):
        raise InputRefused(f"{where}: field {field!r} should be a list of numbers, it is {_short(value)}")
    return tuple(map(float, numbers))


def _read_rows(path: str, task: Task) -> list[Any]:
    if path.startswith(HUB):
        return _read_hub(path, task)
    file = Path(path)
    if not os.path.exists(path):  # Path.exists raises where the name is impossible
        raise InputRefused(f"data.tasks.{task.name}: no file '{path}'")
    if not file.is_file():
        raise InputRefused(f"data.tasks.{task.name}: '{path}' is a folder; name a json, jsonl, csv or parquet file")
    if file.stat().st_size == 0:
        raise InputRefused(f"{path}: the file is empty")
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    if file.suffix not in readers:
        raise InputRefused(f"{path}: unknown kind of file '{file.suffix}'; there are {', '.join(readers)}")
    return readers[file.suffix](file)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputRefused(f"{file}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise InputRefused(f"{file}: cannot be read: {error.strerror}") from error


def _read_json(file: Path) -> list[Any]:
    text = _text(file)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _read_jsonl(file)  # JSON lines under the name .json
        raise InputRefused(f"{file}, line {error.lineno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise InputRefused(f"{file}: {_not_json(error)}") from error
    if not isinstance(content, list):
        raise InputRefused(f"{file}: a JSON data file is a list of rows, this is {_short(content)}")
    return content


def _read_jsonl(file: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(_text(file).split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise InputRefused(f"{file}, line {number}: {_not_json(error)}") from error
    return rows


def _not_json(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg}"
    return "nested too deeply" if isinstance(error, RecursionError) else "holds a number of too many digits"


def _read_csv(file: Path) -> list[Any]:
    """Fields stay text: 007 is not 7, and NA is not missing."""
    try:
        reader = csv.DictReader(io.StringIO(_text(file), newline=""), strict=True)
        rows = list(reader)
    except csv.Error as error:
        raise InputRefused(f"{file}: not a csv file: {error}") from error
    names = list(reader.fieldnames or ())
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputRefused(f"{file}: two columns are called {twice!r}")
    for number, row in enumerate(rows, 1):
        if None in row:  # a comma that is not quoted would cut the answer short
            raise InputRefused(f"{file}, row {number}: more fields than the header names; quote text that holds commas")
    return rows


def _read_parquet(file: Path) -> list[Any]:
    # Not `datasets`: its cache goes by path and time of change, and gave the rows of an older file (datasets 5.0).
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(file) as content:
            rows: list[Any] = content.read().to_pylist()
    except (ValueError, OSError) as error:
        raise InputRefused(f"{file}: not a parquet file: {str(error).splitlines()[0]}") from error
    return rows


def _read_hub(path: str, task: Task) -> list[Any]:
    import datasets

    name, _, split = path.removeprefix(HUB).partition(":")
    try:
        return list(datasets.load_dataset(name, split=split or "train"))
    except (datasets.exceptions.DatasetNotFoundError, ValueError, OSError) as error:
        raise InputRefused(f"data.tasks.{task.name}: '{path}' cannot be got: {str(error).splitlines()[0]}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


__all__ = ["FORMATS", "Format", "Pair", "content_hash", "find_format", "read_pairs"]
