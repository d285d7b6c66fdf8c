"""Rows of a file, one at a time: each a value, or the reason why it is none.

A row longer than `MAX_ROW_BYTES` is passed over unread, so that no file takes more memory than one row; only a JSON
list is parsed whole, as JSON demands. Text may be packed by gzip (`rows.jsonl.gz`).
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from qd2mora.errors import InputRefused
from qd2mora.recipe import Task
from qd2mora.recipe.data import HUB, TEXT

MAX_ROW_BYTES = 8 << 20
MAX_UNPACKED_BYTES = 1 << 30
"""Of a packed JSON list, which is held whole: a few MiB could unpack to any size."""
PACKED = ".gz"


class BadRow(ValueError):  # noqa: N818 - reads as the sentence it is
    """A row that cannot be learned from: `reason` is what is counted, `detail` what this one has."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason + detail)
        self.reason = reason


class Repeated:
    """Stands for a JSON object in which a key is given twice: a reader that takes the last one would hide it."""

    def __init__(self, key: str) -> None:
        self.key = key


def rows_of(path: str, task: Task) -> Iterator[tuple[str, object]]:
    """Yield (place, row) of a data file or hub data set; what cannot be read as a row is a BadRow in its place.

    Raises InputRefused where the file as a whole cannot be read.
    """
    if path.startswith(HUB):
        return _numbered(_hub_rows(path, task))
    file = Path(path)
    try:
        if not file.exists():
            raise InputRefused(f"data.tasks.{task.name}: no file '{path}'")
        if not file.is_file():
            what = "a folder" if file.is_dir() else "not an ordinary file"
            raise InputRefused(
                f"data.tasks.{task.name}: '{path}' is {what}; name a json, jsonl, csv, txt, parquet or arrow file"
            )
        if file.stat().st_size == 0:
            raise InputRefused(f"{path}: the file is empty")
        file.open("rb").close()
    except (OSError, ValueError) as error:
        raise InputRefused(f"data.tasks.{task.name}: no file '{path}': {error}") from error
    name = file.name.lower()
    is_packed = name.endswith(PACKED)
    kind = Path(name.removesuffix(PACKED)).suffix
    texts = dict(_TEXT_READERS)
    if task.format != TEXT:  # a row of fields is no document
        del texts[".txt"]
    readers = texts if is_packed else texts | _READERS
    if kind not in readers:
        shown = kind + PACKED if is_packed else kind
        known = ", ".join([*(texts | _READERS), *(each + PACKED for each in texts)])
        raise InputRefused(f"{path}: unknown kind of file '{shown}'; there are {known}")
    rows = readers[kind](file)
    return _unpacked(rows, file) if is_packed else rows


def _open(file: Path) -> BinaryIO:
    """Open the text of a file, unpacked."""
    if file.name.lower().endswith(PACKED):
        return cast(BinaryIO, gzip.open(file, "rb"))
    return file.open("rb")


def _unpacked(rows: Iterator[tuple[str, object]], file: Path) -> Iterator[tuple[str, object]]:
    try:
        yield from rows
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputRefused(f"{file}: not a whole gzip file: {error}") from error


def parse_row(text: str) -> object:
    """Parse one JSON text. Raises BadRow."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise BadRow("not JSON", f": {error.msg}") from error
    except RecursionError as error:
        raise BadRow("nested too deeply") from error
    except ValueError as error:
        raise BadRow("holds a number of too many digits") from error


def _object(pairs: list[tuple[str, object]]) -> object:
    content = dict(pairs)
    if len(content) == len(pairs):
        return content
    names = [name for name, _ in pairs]
    return Repeated(next(name for name in names if names.count(name) > 1))


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # json.loads would make one for each row


def _numbered(rows: Iterator[object]) -> Iterator[tuple[str, object]]:
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _jsonl_rows(file: Path) -> Iterator[tuple[str, object]]:
    """A place is the row where it parses, the line where it does not: empty lines count as lines alone."""
    row = 0
    for line, text in enumerate(_lines(file), 1):
        if isinstance(text, str) and not text.strip():
            continue
        row += 1
        if isinstance(text, BadRow):
            yield f"line {line}", text
            continue
        try:
            value = parse_row(text)
        except BadRow as error:
            yield f"line {line}", error
        else:
            yield f"row {row}", value


def _lines(file: Path) -> Iterator[str | BadRow]:
    place = 0
    with _open(file) as stream:
        while line := stream.readline(MAX_ROW_BYTES + 1):
            begin, place = place, place + len(line)
            if len(line) > MAX_ROW_BYTES:
                while not line.endswith(b"\n") and (line := stream.readline(1 << 20)):
                    place += len(line)
                yield BadRow(f"longer than {MAX_ROW_BYTES} bytes")
                continue
            try:
                yield line.decode("utf-8-sig" if begin == 0 else "utf-8")
            except UnicodeDecodeError as error:
                yield BadRow("not UTF-8", f" at byte {begin + error.start}; save it as UTF-8")


def _json_rows(file: Path) -> Iterator[tuple[str, object]]:
    """A list of rows, one row, or {"data": [...]}; or JSON lines under the name .json."""
    with _open(file) as stream:
        content = stream.read(MAX_UNPACKED_BYTES + 1) if file.suffix.lower() == PACKED else stream.read()
    if len(content) > MAX_UNPACKED_BYTES and file.suffix.lower() == PACKED:
        raise InputRefused(f"{file}: unpacks to more than {MAX_UNPACKED_BYTES} bytes; JSON lines are read row by row")
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        if content[:64].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
            yield from _jsonl_rows(file)
            return
        raise InputRefused(_not_json(file, error)) from error
    if isinstance(value, dict):
        # Under another name than `data`, or beside other keys, a list is a field of the one row.
        value = value["data"] if list(value) == ["data"] and isinstance(value["data"], list) else [value]
    elif isinstance(value, Repeated):
        value = [value]
    if not isinstance(value, list):
        raise InputRefused(f"{file}: a JSON data file is a list of rows, this is {type(value).__name__}")
    yield from _numbered(iter(value))


def _not_json(file: Path, error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{file}, line {error.lineno}: not JSON: {error.msg}"
    if isinstance(error, UnicodeDecodeError):
        return f"{file}: not UTF-8 at byte {error.start}; save it as UTF-8"
    return f"{file}: {'nested too deeply' if isinstance(error, RecursionError) else 'a number of too many digits'}"


def _txt_rows(file: Path) -> Iterator[tuple[str, object]]:
    """One row, with the whole file as its `text`: line breaks are part of a document."""
    with _open(file) as stream:
        content = stream.read(MAX_ROW_BYTES + 1)
    if len(content) > MAX_ROW_BYTES:
        yield "row 1", BadRow(f"longer than {MAX_ROW_BYTES} bytes", "; several documents are rows of a jsonl file")
        return
    try:
        yield "row 1", {"text": content.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        yield "row 1", BadRow("not UTF-8", f" at byte {error.start}; save it as UTF-8")


def _csv_rows(file: Path) -> Iterator[tuple[str, object]]:
    return _numbered(_csv_values(file))


class _CsvLines:
    """Lines for a reader of csv, none of them from a row that is too long."""

    def __init__(self, stream: io.TextIOBase) -> None:
        self._stream = stream
        self._line, self._size, self._quotes = "", 0, 0
        self.is_too_long = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self._read()
        if not self._line:
            raise StopIteration
        if self._size > MAX_ROW_BYTES:
            self.is_too_long = True
            raise csv.Error(f"longer than {MAX_ROW_BYTES} letters")
        return self._line

    def begin_row(self) -> None:
        """Count anew."""
        self._size = self._quotes = 0
        self.is_too_long = False

    def pass_over(self) -> bool:
        """Read to the end of the row; return whether there is one: each quote that opens must close."""
        while self._line and (self._quotes % 2 or not self._line.endswith(("\n", "\r"))):
            self._read()
        return self._quotes % 2 == 0

    def _read(self) -> None:
        self._line = self._stream.readline(MAX_ROW_BYTES + 1)
        self._size += len(self._line)
        self._quotes += self._line.count('"')


def _csv_values(file: Path) -> Iterator[object]:
    """Fields stay text: 007 is not 7, and NA is not missing."""
    # Python's own limit is 131,072 letters a field; rows are limited here.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    # Bytes that are not UTF-8 become lone surrogates, which are refused row by row.
    with io.TextIOWrapper(_open(file), encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        lines = _CsvLines(stream)
        reader = csv.DictReader(lines, strict=True)
        try:
            names = list(reader.fieldnames or ())
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise InputRefused(f"{file}: the header names '{twice}' twice")
            while True:
                yield _csv_row(reader, lines)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputRefused(f"{file}, line {reader.line_num}: not a csv file: {error}") from error


def _csv_row(reader: "csv.DictReader[str]", lines: _CsvLines) -> object:
    """Return the next row. Raises StopIteration, csv.Error."""
    lines.begin_row()
    try:
        row = next(reader)
    except csv.Error:
        if not lines.is_too_long or not lines.pass_over():
            raise
        return BadRow(f"longer than {MAX_ROW_BYTES} letters")
    if None in row:  # a comma that is not quoted would cut the answer short
        return BadRow("more fields than the header names", "; quote text that holds commas")
    if None in row.values():
        return BadRow("fewer fields than the header names")
    return row


def _parquet_rows(file: Path) -> Iterator[tuple[str, object]]:
    return _numbered(_parquet_values(file))


def _parquet_values(file: Path) -> Iterator[object]:
    # Not `datasets`: its cache goes by path and time of change, and gave the rows of an older file (datasets 5.0).
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(file) as content:
            for batch in content.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (ValueError, OSError) as error:
        raise InputRefused(f"{file}: not a parquet file: {str(error).splitlines()[0]}") from error


def _arrow_rows(file: Path) -> Iterator[tuple[str, object]]:
    return _numbered(_arrow_values(file))


def _arrow_values(file: Path) -> Iterator[object]:
    """Arrow's file form, or its stream form, which `datasets` saves."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(file)) as content:
            is_file = content.read(6) == b"ARROW1"
            content.seek(0)
            if is_file:
                reader = pyarrow.ipc.open_file(content)
                batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            else:
                batches = iter(pyarrow.ipc.open_stream(content))
            for batch in batches:
                for start in range(0, batch.num_rows, 1024):
                    yield from batch.slice(start, 1024).to_pylist()
    except (ValueError, OSError) as error:
        raise InputRefused(f"{file}: not an arrow file: {str(error).splitlines()[0]}") from error


def _hub_rows(path: str, task: Task) -> Iterator[object]:
    import datasets

    name, _, split = path.removeprefix(HUB).partition(":")
    try:
        # A stream fails where it breaks off, not where it begins.
        yield from datasets.load_dataset(name, split=split or "train", streaming=task.streaming)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise InputRefused(f"data.tasks.{task.name}: '{path}' cannot be got: {str(error).splitlines()[0]}") from error


Reader = Callable[[Path], Iterator[tuple[str, object]]]
_TEXT_READERS: dict[str, Reader] = {
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".txt": _txt_rows,
}
_READERS: dict[str, Reader] = {".parquet": _parquet_rows, ".arrow": _arrow_rows}

__all__ = ["MAX_ROW_BYTES", "BadRow", "Repeated", "parse_row", "rows_of"]
