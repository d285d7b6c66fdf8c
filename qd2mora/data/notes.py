"""What is said of a task's rows before they are learned from, in `preview` and at the start of training."""

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from qd2mora.data.prepare import TaskRows
from qd2mora.data.row_keys import names_counted
from qd2mora.data.token_rows import Row, TokenRows
from qd2mora.recipe.data import AS_IT_IS, INSTRUCTION, TEXT

ROWS_LOOKED_AT = 20_000
"""Rows of a task whose end tokens are looked for."""


def notes(task: TaskRows, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield a line for each thing about a task's rows that one would not expect."""
    yield from names_counted(task.skipped.unread)
    for remark, number in task.skipped.remarks.items():
        yield f"{number} rows {remark}"
    if task.reads_clock:
        yield "the chat template words the time of day or the date: a run keeps the time that it began at"
    yield from _pieces(task)
    yield from _open_ends(task, tokenizer)


def is_learned(row: Row) -> NDArray[np.bool_]:
    """Return for each token of a row whether it is learned."""
    learned = np.zeros(len(row.ids), dtype=bool)
    for start, stop in (*row.earlier, (row.masked, len(row.ids))):
        learned[max(start, 1) : stop] = True
    return learned


def _pieces(task: TaskRows) -> Iterator[str]:
    rows = task.train
    if isinstance(rows, TokenRows) and rows.starts is not None and rows.starts.any():
        documents = len(np.unique(rows.places))
        yield (
            f"{documents} documents become {len(rows)} rows; a row that goes on begins with the token before it, "
            "which is given"
        )


def _open_ends(task: TaskRows, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    if task.task.format == TEXT:  # the end token closes a document, not each of its rows
        return
    # A row that lost its end to the limit cannot hold an end token, and is told of already.
    whole = task.train
    if isinstance(whole, TokenRows):
        whole = whole.where(~whole.is_cut)
    ends, rows = _end_tokens(tokenizer), itertools.islice(whole, ROWS_LOOKED_AT)
    is_open = sum(not np.isin(row.ids[is_learned(row)], ends).any() for row in rows)
    if not is_open:
        return
    line = f"{is_open} whole rows never learn the end token {tokenizer.eos_token}: their answers may not end"
    if task.task.wording not in (INSTRUCTION, AS_IT_IS):
        line += f"; template {task.task.wording} closes a turn with no token of this tokenizer"
        if task.task.wording != "plain":
            line += ", template: plain closes it with the end token"
    yield line


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that may end an answer: the end token, and special ones that stand for nothing else."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    other = {tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id}
    return sorted((added | set(tokenizer.all_special_ids)) - other | {tokenizer.eos_token_id})


__all__ = ["ROWS_LOOKED_AT", "is_learned", "notes"]
