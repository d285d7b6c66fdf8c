"""From recipe to token rows: reading, holding out, tokenising, masking, counting what was cut."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from qd2mora.data import chat
from qd2mora.data.chat_template import ChatTemplate, reads_clock
from qd2mora.data.conversation import UNLEARNED
from qd2mora.data.formats import find_format
from qd2mora.data.judged import refuse_one_kind, within_limit
from qd2mora.data.pair import Pair
from qd2mora.data.read import Skipped, content_hash, iterate_pairs
from qd2mora.data.token_rows import PairedRows, Row, TokenRows, lengths_of
from qd2mora.data.token_store import RowsToStore, TokenStore, open_store
from qd2mora.data.tokenise import Tokeniser, special_tokens, tokenizer_text
from qd2mora.disk.file_hash import hash_of_bytes
from qd2mora.errors import InputRefused
from qd2mora.recipe import Data, Task
from qd2mora.recipe.data import AS_IT_IS, HUB, INSTRUCTION

MAX_DROPPED = 0.05
"""Share of training rows that may lose their whole answer to `max_length` where bad rows are errors."""
MANY_CUT = 0.05
"""Share of training rows cut at the end from which on a warning is due."""

_log = logging.getLogger(__name__)


@dataclass
class TaskRows:
    """A task ready for use."""

    task: Task
    train: Sequence[Row] = field(default_factory=list)
    validation: Sequence[Row] = field(default_factory=list)
    num_cut: int = 0
    """Training rows that lost their end to `max_length`."""
    num_dropped: int = 0
    """Training rows that lost their whole answer, and are left out."""
    reads_clock: bool = False
    """Whether its template words the time."""
    skipped: Skipped = field(default_factory=Skipped)
    """Rows of the files that could not be learned from (`data.on_bad_row: skip`), and rows said twice."""

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each training row."""
        return lengths_of(self.train)


def prepare(data: Data, tokenizer: PreTrainedTokenizerBase, seed: int, clock: str | None = None) -> list[TaskRows]:
    """Read and tokenise every task; held-out rows depend on the seed and the task's name alone.

    Raises InputRefused with file and row, and where a task has nothing left to learn. Where bad rows are skipped, how
    many, why and where is logged, and kept in `TaskRows.skipped`.
    """
    tokeniser = Tokeniser(tokenizer, clock)
    return [_prepare_task(data, index, tokenizer, tokeniser, seed) for index in range(len(data.tasks))]


def encode(
    pairs: list[Pair],
    tokenizer: PreTrainedTokenizerBase,
    task: int,
    max_length: int,
    mask_prompt: bool,
    group: int = 0,
) -> list[Row]:
    """Tokenise rows of prompt and answer at once; the end token closes the answer and is learned.

    Rows longer than `max_length` lose their end; documents become several, as `TokenRows.in_pieces` has it.
    """
    rows = []
    for pair, tokens in zip(pairs, Tokeniser(tokenizer).tokens(pairs), strict=True):
        if pair.is_document:
            whole, step = np.asarray(tokens.ids, dtype=np.int32), max_length - 1
            starts = range(0, max(1, len(whole) - 1), step)
            rows += [Row(task, whole[start : start + max_length], 1, pair, group) for start in starts]
            continue
        ids = np.asarray(tokens.ids[:max_length], dtype=np.int32)
        masked = min(tokens.bounds[-1], len(ids)) if mask_prompt else 0
        rows.append(Row(task, ids, masked, pair, group, marks=tokens.marks))
    return rows


def _prepare_task(
    data: Data, index: int, tokenizer: PreTrainedTokenizerBase, tokeniser: Tokeniser, seed: int
) -> TaskRows:
    task = data.tasks[index]
    store = _stored_rows(data, task, task.path, tokenizer, tokeniser)
    skipped = store.skipped
    if isinstance(task.validation, str):
        places, other = np.arange(len(store)), _stored_rows(data, task, task.validation, tokenizer, tokeniser)
        held_out = _rows(data, index, other, np.arange(len(other)), "last")
        skipped.add(other.skipped)
    else:
        places, held = _hold_out(store, task, seed)
        held_out = _rows(data, index, store, held, "last")
    rows = _rows(data, index, store, places, "turns" if data.mask_prompt else "none")
    row_format = find_format(task)
    if row_format.answers:
        rows, held_out = (within_limit(data, task, each, skipped) for each in (rows, held_out))
        refuse_one_kind(data, task, row_format, rows)
        skipped.duplicates //= len(row_format.answers)
    if not data.mask_prompt and UNLEARNED in skipped.remarks:
        raise InputRefused(
            f"data.mask_prompt: false learns every message, and {skipped.remarks[UNLEARNED]} rows of task {task.name} "
            f"{UNLEARNED}; take one of the two back"
        )
    if skipped.total:
        _log.warning("data.tasks.%s: %s", task.name, skipped.line())
    train = rows.where(rows.is_learned)
    result = TaskRows(task, train, held_out.where(held_out.is_learned), skipped=skipped)
    result.reads_clock = reads_clock(_template_text(task, tokenizer) or "")
    result.num_dropped = len(rows) - len(train)
    result.num_cut = int(train.is_cut.sum())
    _refuse_masked(data, result, rows)
    if data.spans is not None:
        _note_spans(data, result)
    if result.num_cut > MANY_CUT * len(rows):
        _log.warning(
            "data.tasks.%s: %d of %d rows lose the end of the answer to data.max_length %d; the longest has %d tokens",
            *(task.name, result.num_cut, len(rows), data.max_length, store.lengths[places].max()),
        )
    return result


def _rows(data: Data, index: int, store: TokenStore, places: NDArray[np.int64], masking: str) -> TokenRows:
    """Return the rows of a task at some places of a store."""
    task = data.tasks[index]
    row_format, settings = find_format(task), (index, data.max_length, masking, task.group or 0)
    if row_format.is_compared:
        return PairedRows(store, places[:: len(row_format.answers)], *settings)
    rows = TokenRows(store, places, *settings)
    return rows.in_pieces() if row_format.is_document else rows


def _stored_rows(
    data: Data, task: Task, path: str, tokenizer: PreTrainedTokenizerBase, tokeniser: Tokeniser
) -> TokenStore:
    """Return a file's rows as tokens. A hub data set is read each time: its name does not tell what is in it."""
    find_format(task)

    def read(skipped: Skipped) -> Iterator[Pair]:
        with worded_by(task, tokenizer, tokeniser.clock) as template:
            left_out = skipped if data.on_bad_row == "skip" else None
            yield from iterate_pairs(task, path, left_out, template, skipped, data.spans)

    # Read anew: nothing here tells whether what the name stands for has changed.
    if path.startswith(HUB) or not os.path.isfile(path):
        return open_store(RowsToStore(task.name, read, None, 0, path, task.limit), tokeniser)
    names = ("format", "fields", "select", "limit", "vector", "wording", "turns")
    key: dict[str, object] = {name: getattr(task, name) for name in names}
    key |= {"file": content_hash(path), "path": path, "on_bad_row": data.on_bad_row, "spans": data.spans}
    key["tokenizer"] = hash_of_bytes(tokenizer_text(tokenizer).encode())
    # Or a store made yesterday would give rows that word yesterday.
    if reads_clock(_template_text(task, tokenizer) or ""):
        key["clock"] = tokeniser.clock or datetime.now().isoformat()
    return open_store(RowsToStore(task.name, read, key, os.path.getsize(path), path, task.limit), tokeniser)


@contextmanager
def worded_by(
    task: Task, tokenizer: PreTrainedTokenizerBase, clock: str | None = None
) -> Iterator[ChatTemplate | None]:
    """Yield what words this task's rows; None where the format does."""
    find_format(task)
    if task.wording in (INSTRUCTION, AS_IT_IS):
        yield None
        return
    where, text = f"data.tasks.{task.name}", _template_text(task, tokenizer)
    if task.wording not in chat.TEMPLATES:
        where = "base.model"
    if not isinstance(text, str):
        raise InputRefused(
            f"data.tasks.{task.name}.template: the tokenizer has no chat template; name one of "
            f"{', '.join(chat.TEMPLATES)}"
        )
    with ChatTemplate(text, special_tokens(tokenizer), where, clock) as template:
        yield template


def _template_text(task: Task, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the text of what words a task's rows; None where that is no template, or the tokenizer has none."""
    if task.wording in (INSTRUCTION, AS_IT_IS):
        return None
    text = chat.TEMPLATES.get(task.wording, tokenizer.chat_template)
    return text if isinstance(text, str) else None


def _refuse_masked(data: Data, result: TaskRows, rows: TokenRows) -> None:
    """Refuse a task that `max_length` leaves without answers, wholly or in more rows than an oversight explains."""
    where = f"data.tasks.{result.task.name}"
    if not result.train:
        raise InputRefused(
            f"{where}: every label is masked: no answer fits data.max_length {data.max_length} "
            f"(the shortest prompt takes {rows.lengths.min()} tokens or more)"
        )
    if data.on_bad_row == "error" and result.num_dropped > MAX_DROPPED * len(rows):
        share = f"{result.num_dropped} of {len(rows)} rows, more than {MAX_DROPPED:.0%},"
        raise InputRefused(
            f"{where}: {share} have no room for an answer within data.max_length {data.max_length}; raise it, or leave "
            "them out with data.on_bad_row: skip"
        )


def _note_spans(data: Data, result: TaskRows) -> None:
    """Count the training rows whose spans `max_length` cuts, or that mark no token."""
    cut = unmarked = 0
    for row in result.train:
        marks = row.marks or ()
        is_lost = sum(start >= len(row.ids) for _, start, _ in marks)
        cut += any(stop > len(row.ids) for _, _, stop in marks)
        unmarked += is_lost == len(marks)
    remarks = {f"lose a marked span, or its end, to data.max_length {data.max_length}": cut}
    remarks["have no token in a marked span: no adapter acts there"] = unmarked
    result.skipped.remarks |= {remark: number for remark, number in remarks.items() if number}
    if cut:
        _log.warning("data.tasks.%s: %d of %d rows %s", result.task.name, cut, len(result.train), next(iter(remarks)))


def _hold_out(store: TokenStore, task: Task, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the places of rows to learn from and of rows held out, each in the file's order.

    What was made of one row of the file stays together.
    """
    assert isinstance(task.validation, int)
    number = int(store.sources[-1]) + 1
    if task.validation >= number:
        raise InputRefused(
            f"data.tasks.{task.name}.validation: {task.validation} rows to hold out of {number} leave none to learn"
        )
    # By the name and not by the task's number: a task that is added or moved changes no other task's held-out rows.
    order = np.random.default_rng([seed, *task.name.encode()]).permutation(number)
    is_held = np.zeros(number, dtype=bool)
    is_held[order[: task.validation]] = True
    is_held = is_held[store.sources]
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


__all__ = ["TaskRows", "encode", "prepare", "worded_by"]
