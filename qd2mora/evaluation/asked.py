"""What is asked: tasks of a recipe or of a suite as rows with right answers, and what makes an answer right."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qd2mora.data import Row, TaskRows, encode
from qd2mora.errors import InputRefused
from qd2mora.evaluation.suites import find_suite, read_items, suite_task_names

MOST_CHOICES = 64
SCORINGS = ("generate", "likelihood")


@dataclass(frozen=True)
class AskedTask:
    """A task to ask. `labels`: what is right, a row each; `choices`: the texts to weigh, a row each, where they are.

    `metric`: `exact`, the written words are the right ones; `extract`, the first match of `pattern` in what is written
    is; `choice`, the right choice is the likeliest; `rouge`, ROUGE-L of what is written; `loss`, nothing is written.
    """

    name: str
    metric: str
    rows: list[Row]
    labels: list[str]
    max_new_tokens: int
    choices: list[tuple[str, ...]] = field(default_factory=list)
    pattern: str = ""


def ask_held_out(tasks: list[TaskRows], limit: int | None = None) -> list[AskedTask]:
    """Return the held-out rows of every task that has some, the first `limit` of each, by the task's own metric.

    Raises InputRefused where a task of choices has too many different answers to be one.
    """
    asked = []
    for task in tasks:
        rows, metric = list(task.validation[:limit]), task.task.metric or "exact"
        if not rows:
            continue
        choices = _answers_of(task) if metric == "choice" else ()
        # One token more than the longest answer tells that an answer goes on; the end token is the other.
        longest = max(len(row.ids) - row.masked for row in rows) + 2
        labels = [row.pair.answer for row in rows]
        asked.append(AskedTask(task.task.name, metric, rows, labels, longest, [choices] * len(rows)))
    return asked


def ask_suite(
    name: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    scoring: str = "generate",
    prompt: str = "published",
    only: Collection[str] = (),
    limit: int | None = None,
    numbers: dict[str, int] | None = None,
) -> list[AskedTask]:
    """Return a suite's tasks, or those named in `only`; `numbers` gives each the task number that routers read.

    Raises InputRefused where a file or an answer is missing.
    """
    if scoring not in SCORINGS:
        raise InputRefused(f"--scoring: '{scoring}' will not do: {' or '.join(SCORINGS)}")
    suite, names, asked = find_suite(name), suite_task_names(name, only), []
    for task in suite.tasks:
        if task.name not in names:
            continue
        items = read_items(suite, task, folder, prompt, limit)
        number = (numbers or {}).get(task.name, 0)
        # The right answer's end is never cut: what a suite asks is short.
        rows = encode([item.pair for item in items], tokenizer, number, 1 << 20, True)
        labels = [item.label for item in items]
        metric = "extract" if scoring == "generate" else "choice"
        texts: list[tuple[str, ...]] = []
        if metric == "choice":
            labels = [item.pair.answer for item in items]
            texts = [tuple(suite.answer.replace("{label}", each) for each in item.choices) for item in items]
        asked.append(AskedTask(task.name, metric, rows, labels, suite.max_new_tokens, texts, task.pattern))
    return asked


def _answers_of(task: TaskRows) -> tuple[str, ...]:
    """Return a task's different answers, in alphabetical order: its choices."""
    answers = {row.pair.answer for row in (*task.train, *task.validation)}
    if len(answers) > MOST_CHOICES:
        raise InputRefused(
            f"data.tasks.{task.task.name}.metric: choice weighs every answer that occurs, here {len(answers)} "
            f"(limit {MOST_CHOICES}); exact or rouge"
        )
    return tuple(sorted(answers))


__all__ = ["MOST_CHOICES", "SCORINGS", "AskedTask", "ask_held_out", "ask_suite"]
