"""A few held-out rows and what each model answers: for eyes, not for scores."""

from dataclasses import dataclass

from qd2mora.data import Row, TaskRows
from qd2mora.evaluation.answering import write_answers
from qd2mora.evaluation.subject import Subject

ROWS_OF_A_TASK = 2
MOST_TASKS = 8
MOST_TOKENS = 64


@dataclass(frozen=True)
class Sample:
    """A row as `samples.json` keeps it: its task, prompt and right answer, and the answers given, by model."""

    task: str
    prompt: str
    right: str
    answers: dict[str, str]


def sampled_rows(tasks: list[TaskRows]) -> list[Row]:
    """Return the first held-out rows of the first tasks."""
    return [row for task in tasks[:MOST_TASKS] for row in task.validation[:ROWS_OF_A_TASK]]


def sample_answers(subject: Subject, rows: list[Row]) -> list[str]:
    """Return a model's answers, greedy, one row at a time."""
    return [write_answers(subject, [row], min(MOST_TOKENS, len(row.ids) - row.masked + 8))[0] for row in rows]


def samples_of(tasks: list[TaskRows], rows: list[Row], answers: dict[str, list[str]]) -> list[Sample]:
    """Return rows with the answers of every model."""
    return [
        Sample(
            tasks[row.task].task.name,
            row.pair.prompt,
            row.pair.answer,
            {model: texts[place] for model, texts in answers.items()},
        )
        for place, row in enumerate(rows)
    ]


__all__ = ["Sample", "sample_answers", "sampled_rows", "samples_of"]
