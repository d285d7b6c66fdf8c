"""What of a task's judged answers cannot be compared once they are tokens: counted, named, refused or left out."""

import logging

import numpy as np

from qd2mora.data.read import Skipped
from qd2mora.data.row_format import RowFormat
from qd2mora.data.token_rows import TokenRows
from qd2mora.errors import InputRefused
from qd2mora.recipe import Data, Task

_log = logging.getLogger(__name__)


def within_limit(data: Data, task: Task, rows: TokenRows, skipped: Skipped) -> TokenRows:
    """Return the rows that `max_length` cuts nothing of: an answer without its end is another answer.

    The others are noted. Raises InputRefused where bad rows are errors.
    """
    is_cut = rows.is_cut
    if not is_cut.any():
        return rows
    numbers = rows.store.sources[rows.places[is_cut]] + 1
    if data.on_bad_row == "error":
        longest = rows.store.lengths[rows.places].max()
        raise InputRefused(
            f"data.tasks.{task.name}: {len(numbers)} of {len(rows)} rows are longer than data.max_length "
            f"{data.max_length}, the first is row {numbers[0]} (the longest answer ends at token {longest}); raise it, "
            "or leave them out with data.on_bad_row: skip"
        )
    places = [f"{task.path}, row {number}" for number in numbers]
    skipped.places.setdefault(f"longer than data.max_length {data.max_length}", []).extend(places)
    return rows.where(~is_cut)


def refuse_one_kind(data: Data, task: Task, row_format: RowFormat, rows: TokenRows) -> None:
    """Refuse ratings that are all good, or all bad; where bad rows are left out, say so and go on."""
    worths = rows.store.worths[rows.places]
    if row_format.is_compared or not len(worths) or len(np.unique(worths)) > 1:
        return
    kind, other = ("good", "bad") if worths[0] else ("bad", "good")
    line = f"data.tasks.{task.name}: all {len(worths)} rows are rated {kind}, none {other}"
    if data.on_bad_row == "error":
        raise InputRefused(
            f"{line}; add some, or learn from one kind alone with data.on_bad_row: skip (good ones are learned by "
            "objective: sft too)"
        )
    _log.warning("%s: nothing is learned of what is %s", line, other)


__all__ = ["refuse_one_kind", "within_limit"]
