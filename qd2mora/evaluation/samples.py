"""A few held-out rows and what each model answers: for eyes, not for scores."""

from dataclasses import dataclass

from qd2mora.data import Row, TaskRows
from qd2mora.evaluation.answering import write_answers
from qd2mora.evaluation.subject import Subject
from qd2mora.recipe.data import TEXT

ROWS_OF_A_TASK = 2
MOST_TASKS = 8
MOST_TOKENS = 64


@dataclass(frozen=True)
class Sample:
    """A row as `samples.json` holds it: its task, prompt and right answer, and the answers given so far, by model."""

    task: str
    prompt: str
    right: str
    answers: dict[str, str]


def sampled_rows(tasks: list[TaskRows]) -> list[tuple[Row, Sample]]:
    """Return the first held-out rows of the first tasks, each with nothing answered yet."""
    asked = [task for task in tasks if task.task.format != TEXT]  # texts ask nothing
    rows = [(task, row) for task in asked[:MOST_TASKS] for row in task.validation[:ROWS_OF_A_TASK]]
    return [(row, Sample(task.task.name, row.pair.prompt, row.pair.answer, {})) for task, row in rows]


def answer_samples(name: str, subject: Subject, rows: list[tuple[Row, Sample]]) -> None:
    """Add a model's answers, greedy, one row at a time."""
    for row, sample in rows:
        sample.answers[name] = write_answers(subject, [row], min(MOST_TOKENS, len(row.ids) - row.masked + 8))[0]


__all__ = ["Sample", "answer_samples", "sampled_rows"]
