"""Scores while training: each batch of held-out rows is asked by one process, and all know the result."""

from typing import Protocol

from qd2mora.evaluation import AskedTask, Record, Score, Subject
from qd2mora.evaluation.score import refuse_not_finite
from qd2mora.evaluation.scoring import ROWS_AT_ONCE, batches_of, score_batch


class Together(Protocol):
    """What is needed of a run's processes."""

    @property
    def index(self) -> int: ...
    @property
    def count(self) -> int: ...
    def sum_numbers(self, numbers: list[float]) -> list[float]: ...


def score_together(subject: Subject, asked: list[AskedTask], processes: Together) -> dict[str, Score]:
    """Score tasks; what was written stays with the process that asked. Raises NotFinite, on every process.

    Batches are those of one process, so that the numbers are the same for any number of processes.
    """
    return {task.name: _score(subject, task, processes) for task in asked}


def _score(subject: Subject, task: AskedTask, processes: Together) -> Score:
    numbers = [0.0] * (3 * len(task.rows))
    for batch in list(batches_of(task, (), ROWS_AT_ONCE))[processes.index :: processes.count]:
        for record in score_batch(subject, task, batch):
            numbers[3 * record.row : 3 * record.row + 3] = record.value, record.loss, record.labels
    summed = processes.sum_numbers(numbers)
    records = [
        Record(row, summed[3 * row], summed[3 * row + 1], round(summed[3 * row + 2])) for row in range(len(task.rows))
    ]
    refuse_not_finite(task.name, records)
    return Score(task.metric, tuple(records))


__all__ = ["score_together"]
