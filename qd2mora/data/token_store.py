"""Rows as tokens in an arrow file that is mapped, not loaded: a data set may be larger than memory.

What is stored depends on the file, the format and the tokenizer alone; length, masking and what is held out are taken
at reading. Stores of large files are kept in a cache under a hash of all that went in; a store that is damaged is made
anew, one that is long unused is removed.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from qd2mora.data.pair import Pair, Part
from qd2mora.data.read import Skipped
from qd2mora.data.token_cache import ROWS, limit_bytes, mark_used, prune, remove_entry, tokens_folder
from qd2mora.data.tokenise import Tokeniser, Tokens, tokenised
from qd2mora.disk.file_hash import hash_of_bytes
from qd2mora.disk.passing import passing_name, remove_passing
from qd2mora.disk.sealed import open_manifest, seal_whole_folder, verify_folder
from qd2mora.errors import DamagedFile
from qd2mora.terminal import Screen

VERSION = 5
"""Counted up when the same file would be stored otherwise."""
SMALLEST_KEPT = 4 << 20
"""Bytes of a data file from which on its tokens are kept: smaller ones take a second or two."""
_SCHEMA = pa.schema(
    {
        "ids": pa.list_(pa.int32()),
        "bounds": pa.list_(pa.int32()),
        # Texts of a batch may pass the 2 GiB that 32-bit offsets reach; lists count entries, and stay far below.
        "prompt": pa.large_string(),
        "answer": pa.large_string(),
        "vector": pa.list_(pa.float64()),
        "starts_word": pa.bool_(),
        "continues": pa.bool_(),
        "parts": pa.list_(pa.int32()),
        "marks": pa.list_(pa.int32()),
        "worth": pa.float64(),
    }
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowsToStore:
    """Rows of a task's file: `read` starts anew at each call, noting what it leaves out; `key` names all that goes in.

    `path` and `limit` tell how many rows to expect; `size`: bytes of the file, 0 where there is none.
    """

    name: str
    read: Callable[[Skipped], Iterator[Pair]]
    key: dict[str, object] | None
    size: int
    path: str
    limit: int | None


class TokenStore:
    """Stored rows by number. `skipped`: what reading left out, and rows said twice."""

    def __init__(self, buffer: Any, skipped: Skipped) -> None:
        self.skipped = skipped
        reader = pa.ipc.open_file(buffer)
        self._batches = [_Batch(reader.get_batch(number)) for number in range(reader.num_record_batches)]
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def ids(self, number: int) -> NDArray[np.int32]:
        """Return a row's tokens, a view of the mapped file."""
        batch, place = self._find(number)
        return batch.entry("ids", place)

    def bounds(self, number: int) -> NDArray[np.int32]:
        batch, place = self._find(number)
        return batch.entry("bounds", place)

    def parts(self, number: int) -> tuple[Part, ...]:
        """Return what a conversation consists of, in tokens."""
        batch, place = self._find(number)
        numbers = batch.entry("parts", place).tolist()
        return tuple(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))

    def marks(self, number: int) -> tuple[Part, ...] | None:
        """Return a row's marked spans in tokens; None where the data marks none."""
        batch, place = self._find(number)
        numbers = batch.content.column("marks")[place].as_py()
        if numbers is None:
            return None
        return tuple(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))

    def pair(self, number: int) -> Pair:
        """Return a row as text; of a document none is kept beside its tokens."""
        batch, place = self._find(number)
        names = ("prompt", "answer", "vector", "starts_word", "worth")
        prompt, answer, vector, starts_word, worth = (batch.content.column(name)[place].as_py() for name in names)
        return Pair(prompt, answer, None if vector is None else tuple(vector), starts_word=starts_word, worth=worth)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each row."""
        return self._of_all(lambda batch: np.diff(batch.offsets["ids"]))

    @cached_property
    def sources(self) -> NDArray[np.int64]:
        """The number of the row of the file, of those kept, that each row was made of."""
        parts = [batch.content.column("continues").to_numpy(zero_copy_only=False) for batch in self._batches]
        # What continues a row adds nothing to the count, and so has its number.
        return np.cumsum(~np.concatenate([np.zeros(0, np.bool_), *parts])) - 1

    @cached_property
    def worths(self) -> NDArray[np.float64]:
        """What the data says of each row's answer; NaN where it says nothing."""
        parts = [batch.content.column("worth").to_numpy(zero_copy_only=False) for batch in self._batches]
        return np.concatenate([np.zeros(0, np.float64), *parts])

    @cached_property
    def largest_id(self) -> int:
        return max((int(batch.values["ids"].max(initial=0)) for batch in self._batches), default=0)

    @cached_property
    def first_bounds(self) -> NDArray[np.int32]:
        """Tokens before the first learned one of each row."""
        return self._of_all(lambda batch: batch.values["bounds"][batch.offsets["bounds"][:-1]])

    @cached_property
    def last_bounds(self) -> NDArray[np.int32]:
        """Tokens before the last answer of each row."""
        return self._of_all(lambda batch: batch.values["bounds"][batch.offsets["bounds"][1:] - 1])

    def _of_all(self, take: "Callable[[_Batch], NDArray[np.int32]]") -> NDArray[np.int32]:
        parts = [take(batch) for batch in self._batches]
        return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)

    def _find(self, number: int) -> tuple["_Batch", int]:
        which = int(np.searchsorted(self._ends, number, side="right"))
        batch = self._batches[which]
        return batch, number - int(self._ends[which]) + batch.num_rows


class _Batch:
    """One record batch with its lists as numpy views."""

    def __init__(self, content: Any) -> None:
        self.content = content
        self.num_rows: int = content.num_rows
        self.offsets = {name: content.column(name).offsets.to_numpy() for name in ("ids", "bounds", "parts")}
        self.values = {name: content.column(name).values.to_numpy() for name in ("ids", "bounds", "parts")}

    def entry(self, name: str, place: int) -> NDArray[np.int32]:
        start, stop = self.offsets[name][place : place + 2]
        return self.values[name][start:stop]


def open_store(rows: RowsToStore, tokeniser: Tokeniser) -> TokenStore:
    """Return a rows's rows as tokens: from the cache where they are there and whole, else made now.

    Raises InputRefused as reading does.
    """
    if rows.key is None or rows.size < SMALLEST_KEPT:
        return _store_in_memory(rows, tokeniser)
    text = json.dumps({"version": VERSION, **rows.key}, sort_keys=True)
    folder = tokens_folder() / hash_of_bytes(text.encode())[:32]
    if folder.exists():
        try:
            store = _cached_store(folder)
            mark_used(folder)
            return store
        except (DamagedFile, OSError, ValueError) as error:
            _log.warning("data.tasks.%s: kept tokens are made anew: %s", rows.name, error)
            remove_entry(folder)
    limit = limit_bytes()
    try:
        store = _store_in_cache(rows, tokeniser, folder)
        prune(folder.parent, folder, limit)
        return store
    except OSError as error:
        _log.warning("data.tasks.%s: tokens stay in memory, %s: %s", rows.name, folder.parent, error.strerror or error)
        return _store_in_memory(rows, tokeniser)


def _store_in_memory(rows: RowsToStore, tokeniser: Tokeniser) -> TokenStore:
    sink = pa.BufferOutputStream()
    skipped = _write_rows(sink, rows, tokeniser)
    return TokenStore(pa.BufferReader(sink.getvalue()), skipped)


def _store_in_cache(rows: RowsToStore, tokeniser: Tokeniser, folder: Path) -> TokenStore:
    """Write beside the folder under a name of our own and take its name at the end: two runs may do so at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = passing_name(folder)
    stage.mkdir()
    try:
        with pa.OSFile(str(stage / ROWS), "wb") as sink:
            skipped = _write_rows(sink, rows, tokeniser)
        seal_whole_folder(stage, {}, asdict(skipped))
        # A folder that holds files is never renamed onto: of two runs at once the slower one takes the other's.
        if not folder.exists():
            os.rename(stage, folder)
            return _mapped_store(folder, skipped)  # just hashed: no need to read it all again
        return _cached_store(folder)
    finally:
        remove_passing(stage)


def _cached_store(folder: Path) -> TokenStore:
    verify_folder(folder)
    content = open_manifest(folder)
    return _mapped_store(folder, Skipped(**{each.name: content[each.name] for each in fields(Skipped)}))


def _mapped_store(folder: Path, skipped: Skipped) -> TokenStore:
    return TokenStore(pa.memory_map(str(folder / ROWS)), skipped)


def _write_rows(sink: Any, rows: RowsToStore, tokeniser: Tokeniser) -> Skipped:
    skipped = Skipped()
    hashes: list[NDArray[np.int64]] = []
    columns = (TextColumn("tokenising {task.description}"), BarColumn(), TextColumn("{task.completed} rows"))
    shown = sys.stderr.isatty() and rows.size >= SMALLEST_KEPT
    display = Progress(*columns, TimeElapsedColumn(), console=Screen(stderr=True), disable=not shown, transient=True)
    with pa.ipc.new_file(sink, _SCHEMA) as writer, display:
        line = display.add_task(rows.name, total=_rows_expected(rows) if shown else None)
        for pairs, tokens in tokenised(tokeniser, rows.read(skipped)):
            writer.write_batch(_batch(pairs, tokens))
            # Eight bytes a row tell those said twice: hashes of one process are compared with each other alone, and two
            # that meet by chance cost one in a count that is only told.
            hashes.append(np.fromiter(map(hash, pairs), np.int64, len(pairs)))
            display.advance(line, len(pairs))
    skipped.duplicates = sum(map(len, hashes)) - len(np.unique(np.concatenate(hashes)))
    return skipped


def _rows_expected(rows: RowsToStore) -> int | None:
    """Return about how many rows there are, where a line is a row; None lets the bar move to and fro."""
    path = Path(rows.path)
    if path.suffix != ".jsonl":
        return None
    with path.open("rb") as file:
        lines = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    return min(lines, rows.limit or lines)


def _batch(pairs: Sequence[Pair], tokens: Sequence[Tokens]) -> Any:
    columns = [
        _lists([row.parts for row in tokens]),
        _lists([(row.bounds,) for row in tokens]),
        pa.array([pair.prompt for pair in pairs], pa.large_string()),
        pa.array(["" if pair.is_document else pair.answer for pair in pairs], pa.large_string()),
        pa.array([pair.vector for pair in pairs], pa.list_(pa.float64())),
        pa.array([pair.starts_word for pair in pairs], pa.bool_()),
        pa.array([pair.continues for pair in pairs], pa.bool_()),
        _lists([row.spans for row in tokens]),
        pa.array([None if row.marks is None else list(chain(*row.marks)) for row in tokens], pa.list_(pa.int32())),
        pa.array([pair.worth for pair in pairs], pa.float64()),
    ]
    return pa.record_batch(columns, schema=_SCHEMA)


def _lists(rows: Sequence[Sequence[Sequence[int]]]) -> Any:
    """Lists of numbers, each in parts, as one array: no Python object for each number, no copy of each list."""
    flat = chain.from_iterable(chain.from_iterable(rows))
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([sum(map(len, parts)) for parts in rows], out=offsets[1:])
    values = np.fromiter(flat, np.int32, int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


__all__ = ["SMALLEST_KEPT", "RowsToStore", "TokenStore", "open_store"]
