"""A few held-out rows and what each model answers: for eyes, not for scores."""

from dataclasses import dataclass, field
from typing import Any

from qd2mora.data import Row, TaskRows
from qd2mora.evaluation import Subject
from qd2mora.evaluation.answering import write_answers

ROWS_OF_A_TASK = 2
MOST_TASKS = 8
MOST_TOKENS = 64


@dataclass
class Samples:
    """The first held-out rows of the first tasks, with the answers given so far."""

    tasks: list[TaskRows]
    rows: list[Row] = field(init=False)
    content: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        chosen = self.tasks[:MOST_TASKS]
        self.rows = [row for task in chosen for row in task.validation[:ROWS_OF_A_TASK]]
        names = [task.task.name for task in self.tasks]
        self.content = [
            {"task": names[row.task], "prompt": row.pair.prompt, "right": row.pair.answer, "answers": {}}
            for row in self.rows
        ]

    def ask(self, name: str, subject: Subject) -> None:
        """Add the answers of a model, greedy, one row at a time."""
        for row, sample in zip(self.rows, self.content, strict=True):
            room = min(MOST_TOKENS, len(row.ids) - row.masked + 8)
            sample["answers"][name] = write_answers(subject, [row], room)[0]


__all__ = ["Samples"]
