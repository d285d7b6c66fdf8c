"""The first rows of each task: that files are there and can be read, and how long rows are, before all is read."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from transformers import PreTrainedTokenizerBase

from qd2mora.data.file_rows import rows_of
from qd2mora.data.formats import find_format
from qd2mora.data.prepare import encode, worded_by
from qd2mora.data.read import Skipped, iterate_pairs, selected_rows
from qd2mora.data.token_rows import Row
from qd2mora.recipe import Data, Task
from qd2mora.recipe.data import HUB

FIRST = 200
"""Rows of a file that are read."""


@dataclass(frozen=True)
class FirstRows:
    """What the beginning of a task's file holds; `is_all`: the file has no more. Of a hub data set nothing is read."""

    task: Task
    rows: list[Row]
    is_all: bool

    @property
    def mean_length(self) -> float:
        """Tokens of a row, as far as they are learned from."""
        return sum(row.width for row in self.rows) / max(1, len(self.rows))

    def to_json(self) -> dict[str, object]:
        """Return what `plan --json` prints."""
        return {"rows_read": len(self.rows), "is_all": self.is_all, "mean_tokens": round(self.mean_length, 1)}

    def line(self, max_length: int) -> str:
        """Say what was read, and what it tells of lengths."""
        if self.task.path.startswith(HUB):
            return f"task {self.task.name}: '{self.task.path}' is on the hub and was not read"
        number = f"all {len(self.rows)} rows" if self.is_all else f"the first {len(self.rows)} rows"
        num_long = sum(row.width >= max_length for row in self.rows)
        lengths = f"{self.mean_length:.0f} tokens on average, {num_long} of data.max_length {max_length} or more"
        return f"task {self.task.name}: {number} of '{self.task.path}' were read: {lengths}"


def first_rows(data: Data, tokenizer: PreTrainedTokenizerBase) -> Iterator[FirstRows]:
    """Yield the first rows of each task's file as tokens. Raises InputRefused, as training would."""
    for number, task in enumerate(data.tasks):
        if task.path.startswith(HUB):
            yield FirstRows(task, [], False)
            continue
        if isinstance(task.validation, str) and not task.validation.startswith(HUB):
            rows_of(task.validation, task)  # refuses what is not there
        skipped = Skipped() if data.on_bad_row == "skip" else None
        lines = max(1, len(find_format(task).answers))
        with worded_by(task, tokenizer) as template:
            found = iterate_pairs(task, task.path, skipped, template, spans=data.spans)
            pairs = list(islice(found, FIRST * lines + 1))
        rows = encode(pairs[: FIRST * lines], tokenizer, number, data.max_length, data.mask_prompt, task.group or 0)
        if lines > 1:
            rows = [replace(row, against=other) for row, other in zip(rows[::2], rows[1::2], strict=True)]
        yield FirstRows(task, rows, len(pairs) <= FIRST * lines)


def refuse_missing_files(data: Data) -> None:
    """Refuse files that are not there, where rows cannot be read as tokens. Raises InputRefused."""
    for task in data.tasks:
        for path in (task.path, task.validation):
            if isinstance(path, str) and not path.startswith(HUB):
                rows_of(path, task)


def row_count(task: Task, path: str) -> int:
    """Return how many rows of a file a task takes, without a look at what is in them. Raises InputRefused."""
    return sum(1 for _ in islice(selected_rows(task, path), task.limit))


__all__ = ["FIRST", "FirstRows", "first_rows", "refuse_missing_files", "row_count"]
