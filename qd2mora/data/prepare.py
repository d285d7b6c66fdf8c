"""From recipe to token rows: reading, holding out, tokenising, masking, counting what was cut."""

import logging
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from qd2mora.data.read import Pair, Skipped, read_pairs
from qd2mora.errors import InputRefused
from qd2mora.recipe import Data, Task

IGNORE = -100
MAX_DROPPED = 0.05
"""Share of training rows that may lose their whole answer to `max_length` where bad rows are errors."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Row:
    """One example as tokens: `ids` whole, of which the first `masked` are not learned."""

    task: int
    ids: NDArray[np.int32]
    masked: int
    pair: Pair
    group: int = 0

    @property
    def num_labels(self) -> int:
        """Tokens that are predicted and learned: the first token of a row never is."""
        return len(self.ids) - max(self.masked, 1)


@dataclass
class TaskRows:
    """A task ready for use."""

    task: Task
    train: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)
    num_cut: int = 0
    """Training rows that lost their end to `max_length`."""
    num_dropped: int = 0
    """Training rows that lost their whole answer, and are left out."""
    skipped: Skipped = field(default_factory=Skipped)
    """Rows of the files that could not be learned from (`data.on_bad_row: skip`), and rows said twice."""


def prepare(data: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[TaskRows]:
    """Read and tokenise every task; held-out rows depend on the seed and the task's name alone.

    Raises InputRefused with file and row, and where a task has nothing left to learn. Where bad rows are skipped, how
    many, why and where is logged, and kept in `TaskRows.skipped`.
    """
    return [_prepare_task(data, index, tokenizer, seed) for index in range(len(data.tasks))]


def encode(
    pairs: list[Pair],
    tokenizer: PreTrainedTokenizerBase,
    task: int,
    max_length: int,
    mask_prompt: bool,
    group: int = 0,
) -> list[Row]:
    """Tokenise prompt and answer apart, so that the boundary is exact; the end token closes the answer and is learned.

    Rows longer than `max_length` lose their end.
    """
    if not pairs:  # transformers 5 raises on an empty batch
        return []
    prompts = tokenizer([pair.prompt for pair in pairs])["input_ids"]
    answers = tokenizer([pair.answer for pair in pairs], add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id]
    rows = []
    for pair, prompt, answer in zip(pairs, prompts, answers, strict=True):
        if prompt and prompt[-1] == end[0]:  # tokenizers that close every text
            prompt = prompt[:-1]
        ids = np.asarray((prompt + answer + end)[:max_length], dtype=np.int32)
        rows.append(Row(task, ids, min(len(prompt), len(ids)) if mask_prompt else 0, pair, group))
    return rows


def _prepare_task(data: Data, index: int, tokenizer: PreTrainedTokenizerBase, seed: int) -> TaskRows:
    task = data.tasks[index]
    skipped = Skipped()
    noted = skipped if data.on_bad_row == "skip" else None
    pairs = read_pairs(task, task.path, noted)
    skipped.duplicates = len(pairs) - len(set(pairs))
    if isinstance(task.validation, str):
        held_out = read_pairs(task, task.validation, noted)
    else:
        pairs, held_out = _hold_out(pairs, task, seed)
    if skipped.total:
        _log.warning("data.tasks.%s: %s", task.name, skipped.line())
    group = task.group or 0
    rows = encode(pairs, tokenizer, index, data.max_length, data.mask_prompt, group)
    result = TaskRows(task, skipped=skipped)
    result.validation = _labelled(encode(held_out, tokenizer, index, data.max_length, True, group))
    result.train = _labelled(rows)
    end = tokenizer.eos_token_id
    result.num_dropped = len(rows) - len(result.train)
    result.num_cut = sum(row.ids[-1] != end for row in result.train)
    _refuse_masked(data, result, rows)
    return result


def _refuse_masked(data: Data, result: TaskRows, rows: list[Row]) -> None:
    """Refuse a task that `max_length` leaves without answers, wholly or in more rows than an oversight explains."""
    where = f"data.tasks.{result.task.name}"
    if not result.train:
        raise InputRefused(
            f"{where}: every label is masked: no answer fits data.max_length {data.max_length} "
            f"(the shortest prompt takes {min(len(row.ids) for row in rows)} tokens or more)"
        )
    if data.on_bad_row == "error" and result.num_dropped > MAX_DROPPED * len(rows):
        raise InputRefused(
            f"{where}: {result.num_dropped} of {len(rows)} rows have no room for an answer within data.max_length "
            f"{data.max_length}; raise it, or leave them out with data.on_bad_row: skip"
        )


def _labelled(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.num_labels > 0]


def _hold_out(pairs: list[Pair], task: Task, seed: int) -> tuple[list[Pair], list[Pair]]:
    assert isinstance(task.validation, int)
    if task.validation >= len(pairs):
        raise InputRefused(
            f"data.tasks.{task.name}.validation: {task.validation} rows to hold out of {len(pairs)} leave none to learn"
        )
    order = np.random.default_rng([seed, *task.name.encode()]).permutation(len(pairs))
    held = set(order[: task.validation].tolist())
    return (
        [pair for number, pair in enumerate(pairs) if number not in held],
        [pair for number, pair in enumerate(pairs) if number in held],
    )


__all__ = ["IGNORE", "Row", "TaskRows", "encode", "prepare"]
