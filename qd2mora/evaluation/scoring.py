"""Scoring a task batch by batch: which rows go together, and what a metric makes of what the model did."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch

from qd2mora.data import Row
from qd2mora.errors import WillNotFit
from qd2mora.evaluation.answering import answer_losses, weigh_choices, write_answers
from qd2mora.evaluation.questions import AskedTask
from qd2mora.evaluation.rouge import rouge_l
from qd2mora.evaluation.score import Record, Score
from qd2mora.evaluation.subject import Subject
from qd2mora.evaluation.suites import extracted
from qd2mora.memory.faults import tried

ROWS_AT_ONCE = 32


def score_task(
    subject: Subject,
    task: AskedTask,
    *,
    beams: int = 1,
    rows_at_once: int = ROWS_AT_ONCE,
    known: Iterable[Record] = (),
    on_batch: Callable[[list[Record]], None] = lambda records: None,
) -> Score:
    """Score every row that is not `known`; `on_batch` hears of each batch as it is done.

    Rows of like length and as many choices go together; the result does not depend on who shares a batch.
    """
    records = {record.row: record for record in known}
    if task.judge is not None:
        task = replace(task, judge=task.judge.asking(subject))
    for numbers in batches_of(task, records.keys(), rows_at_once):
        done = score_batch(subject, task, numbers, beams)
        records |= {record.row: record for record in done}
        on_batch(done)
    return Score(task.metric, tuple(records[number] for number in range(len(task.rows))))


def batches_of(task: AskedTask, known: Collection[int], rows_at_once: int) -> Iterator[list[int]]:
    """Yield the numbers of rows that run together."""
    fan = [len(each) for each in task.choices] or [0] * len(task.rows)
    left = [number for number in range(len(task.rows)) if number not in known]
    # By length, so that little of a batch is padding; by number of choices, since a batch forks alike.
    left.sort(key=lambda number: (fan[number], len(task.rows[number].ids)))
    while left:
        count = next((place for place, number in enumerate(left) if fan[number] != fan[left[0]]), len(left))
        batch = left[: min(count, rows_at_once)]
        left = left[len(batch) :]
        yield batch


def score_batch(subject: Subject, task: AskedTask, numbers: list[int], beams: int = 1) -> list[Record]:
    """Score the rows of one batch; where memory runs out, one half after the other. Raises WillNotFit for a row."""
    records, _ = tried(lambda: _score(subject, task, numbers, beams))
    if records is not None:
        return records
    if len(numbers) == 1:
        raise WillNotFit(
            f"memory: row {numbers[0] + 1} of task {task.name} cannot be scored on this device, not even alone; "
            "fewer --beams, a lower data.max_length, or a larger device"
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(numbers) // 2
    parts = (numbers[:half], numbers[half:])
    return [record for part in parts for record in score_batch(subject, task, part, beams)]


def _score(subject: Subject, task: AskedTask, numbers: list[int], beams: int) -> list[Record]:
    rows = [task.rows[number] for number in numbers]
    if task.judge is not None:
        return task.judge.records(subject, rows, numbers)
    if task.metric == "choice":
        return _weigh(subject, task, numbers, rows)
    losses = answer_losses(subject, rows) if task.way is None else task.way.losses(subject, rows)
    if task.metric == "loss":
        values = [loss / row.num_labels for loss, row in zip(losses, rows, strict=True)]
        return [
            Record(number, value, loss, row.num_labels)
            for number, value, loss, row in zip(numbers, values, losses, rows, strict=True)
        ]
    written, ties = _written(subject, task, rows, beams)
    texts, values = judged(task, [task.labels[number] for number in numbers], written)
    return [
        Record(number, value, loss, row.num_labels, text=text, tied=tied)
        for number, value, loss, row, text, tied in zip(numbers, values, losses, rows, texts, ties, strict=True)
    ]


def _written(subject: Subject, task: AskedTask, rows: list[Row], beams: int) -> tuple[list[str], list[bool]]:
    """Return what is written after each row's prompt, and whether samples of it were tied."""
    if task.way is None:
        return write_answers(subject, rows, task.max_new_tokens, beams), [False] * len(rows)
    answer_of = partial(extracted, task.pattern) if task.metric == "extract" else task.way.answer_of
    votes = task.way.answers(subject, rows, task.max_new_tokens, answer_of)
    return [vote.text for vote in votes], [vote.is_tied for vote in votes]


def judged(task: AskedTask, labels: list[str], written: list[str]) -> tuple[list[str], list[float]]:
    """Return what counts of each written text, and its value."""
    if task.metric == "extract":
        found = [extracted(task.pattern, text) for text in written]
        return found, [float(text == label) for text, label in zip(found, labels, strict=True)]
    if task.metric == "rouge":
        measure = rouge_l()
        return written, [measure(label, text) for text, label in zip(written, labels, strict=True)]
    return written, [float(text.split() == label.split()) for text, label in zip(written, labels, strict=True)]


def _weigh(subject: Subject, task: AskedTask, numbers: list[int], rows: list[Row]) -> list[Record]:
    ids = [_choice_ids(subject, task.choices[number], task.rows[number].pair.starts_word) for number in numbers]
    records = []
    all_weighed = weigh_choices(subject, rows, ids) if task.way is None else task.way.weigh(subject, rows, ids)
    for number, weighed in zip(numbers, all_weighed, strict=True):
        texts = task.choices[number]
        right = texts.index(task.labels[number])
        by_sum = min(range(len(texts)), key=lambda place: weighed[place].loss)
        # Both are published: the sum favours short choices, the mean long ones.
        by_mean = min(range(len(texts)), key=lambda place: weighed[place].loss / weighed[place].tokens)
        records.append(
            Record(
                number,
                float(by_sum == right),
                weighed[right].loss,
                weighed[right].tokens,
                float(by_mean == right),
                texts[by_sum],
            )
        )
    return records


def _choice_ids(subject: Subject, texts: tuple[str, ...], starts_word: bool) -> list[list[int]]:
    """Tokenise choices as answers; where one begins another, the end token tells them apart."""
    ids = subject.tokeniser.answers(list(texts), starts_word=starts_word)
    begins = any(one != two and two[: len(one)] == one for one in ids for two in ids)
    if not begins:
        return ids
    return [[*each, subject.tokenizer.eos_token_id] for each in ids]


__all__ = ["ROWS_AT_ONCE", "batches_of", "judged", "score_batch", "score_task"]
