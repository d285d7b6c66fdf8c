"""Prompts that ask several tasks at once, answered one after another (MeteoRA's composite-n, arXiv 2405.13053).

A prompt numbers one held-out row of each of n tasks; the answer is to have a line for each, that begins with its
number. Row i asks the tasks from place i mod n on, so that each stands in every place as often. What is written up to
the next number is judged as the task judges an answer; a number that is not there was not attempted. The words around
the questions are ours, as are the tasks; MeteoRA shows two worked examples before, here there are none.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from qd2mora.data.pair import Pair
from qd2mora.data.prepare import encode
from qd2mora.disk.durable import write_json
from qd2mora.errors import InputRefused
from qd2mora.evaluation.answering import write_answers
from qd2mora.evaluation.evaluate import EvalOptions, whole_exam
from qd2mora.evaluation.questions import AskedTask, Exam, ask
from qd2mora.evaluation.score import wilson
from qd2mora.evaluation.scoring import ROWS_AT_ONCE, judged
from qd2mora.evaluation.subject import Subject, open_subject
from qd2mora.safekeeping.places import writing

WRITES = ("exact", "extract", "rouge")
_HEAD = "Answer these {number} questions one after another, each in a line of its own that begins with its number."


@dataclass(frozen=True)
class Composite:
    """One task's part in composite prompts. `right`: the sum of its values; `attempted`: its numbers that are there."""

    metric: str
    rows: int
    attempted: int
    right: float
    by_place: tuple[float, ...]
    """The mean value in each place of a prompt."""

    @property
    def mean(self) -> float:
        return self.right / self.rows

    def to_json(self) -> dict[str, object]:
        """Return it as JSON has it."""
        found = asdict(self) | {"score": self.mean}
        if self.metric != "rouge":
            found["interval"] = wilson(round(self.right), self.rows)
        return found


def ask_composite(
    subject: Subject, asked: Sequence[AskedTask], number: int, rows_at_once: int = ROWS_AT_ONCE
) -> dict[str, Composite]:
    """Ask the first `number` tasks that want an answer written, together; return each one's score.

    Raises InputRefused where there are fewer, or where the adapter reads the task of a row.
    """
    tasks = [task for task in asked if task.metric in WRITES][:number]
    if len(tasks) < number:
        raise InputRefused(
            f"--composite: {number} tasks that write an answer are wanted and {len(tasks)} hold out rows; metric: exact"
        )
    if subject.run is not None and (subject.run.routers.reads_task or subject.run.routers.reads_vector):
        raise InputRefused("--composite: this adapter reads the task or a vector of a row, and here a row has several")
    if subject.reads_spans:
        raise InputRefused("--composite: this adapter acts in marked spans, and questions put together mark none")
    if any(row.pair.segments for task in tasks for row in task.rows):
        raise InputRefused("--composite: chats have turns and no numbered questions; tasks of prompt and answer alone")
    count = min(len(task.rows) for task in tasks)
    orders = [[(first + place) % number for place in range(number)] for first in range(count)]
    pairs = [_pair([tasks[each].rows[row].pair for each in order]) for row, order in enumerate(orders)]
    rows = encode(pairs, subject.tokenizer, 0, 1 << 20, True)
    # As long as the right answer, and half as long again: numbers may be spelled in more tokens.
    longest = max(len(row.ids) - row.masked for row in rows) * 3 // 2 + 2
    written: list[str] = []
    for start in range(0, len(rows), rows_at_once):
        written += write_answers(subject, rows[start : start + rows_at_once], longest)
    return _scored(tasks, orders, written)


def evaluate_composite(
    model: str | Path, exam: Exam, number: int, how: EvalOptions | None = None
) -> dict[str, Composite]:
    """Ask a model the held-out rows of an exam in composite prompts of `number` tasks. Raises InputRefused."""
    exam, how = whole_exam(model, exam), how or EvalOptions()
    how.refuse_beams("--composite")
    if exam.suite is not None or exam.way is not None:
        raise InputRefused("--composite: held-out rows of tasks, written greedily; leave out --suite and the rest")
    with writing("--out", how.place):
        subject = open_subject(model, how.allow_changed)
        found = ask_composite(subject, ask(exam, subject), number, how.rows_at_once)
        if how.place is not None:
            write_json(how.place, {name: each.to_json() for name, each in found.items()})
    return found


def split_answers(text: str, number: int) -> list[str | None]:
    """Return what is written after each number, None where it is not there; a number opens a line."""
    places = [re.search(rf"(?m)^[ \t]*{each + 1}[.):][ \t]*", text) for each in range(number)]
    found: list[str | None] = []
    for each, match in enumerate(places):
        if match is None:
            found.append(None)
            continue
        later = [other.start() for other in places[each + 1 :] if other is not None and other.start() >= match.end()]
        found.append(text[match.end() : min(later, default=len(text))].strip())
    return found


def _pair(parts: Sequence[Pair]) -> Pair:
    asked = "\n\n".join(f"{place}. {part.prompt.strip()}" for place, part in enumerate(parts, 1))
    answers = "\n".join(f"{place}. {part.answer.strip()}" for place, part in enumerate(parts, 1))
    return Pair(f"{_HEAD.format(number=len(parts))}\n\n{asked}\n\n", answers, starts_word=True)


def _scored(tasks: Sequence[AskedTask], orders: list[list[int]], written: list[str]) -> dict[str, Composite]:
    number = len(tasks)
    values, attempted = np.zeros((number, number)), [0] * number
    counts = np.zeros((number, number))
    for row, (order, text) in enumerate(zip(orders, written, strict=True)):
        for place, (each, answer) in enumerate(zip(order, split_answers(text, number), strict=True)):
            counts[each, place] += 1
            if answer is not None:
                attempted[each] += 1
                values[each, place] += judged(tasks[each], [tasks[each].labels[row]], [answer])[1][0]
    return {
        task.name: Composite(
            task.metric,
            len(orders),
            attempted[each],
            float(values[each].sum()),
            tuple((values[each] / counts[each].clip(1)).tolist()),
        )
        for each, task in enumerate(tasks)
    }


__all__ = ["Composite", "ask_composite", "split_answers"]
