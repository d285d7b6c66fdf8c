"""Answers scored by a reward run: ranked among those to the same prompt, and the best of each picked."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from qd2mora.data import Pair, Row
from qd2mora.data.answered import answered
from qd2mora.data.file_rows import BadRow, rows_of
from qd2mora.data.prepare import worded_by
from qd2mora.data.rated import FORMAT
from qd2mora.data.turns import Turns
from qd2mora.disk.durable import write_atomically
from qd2mora.errors import InputRefused, NotFinite
from qd2mora.evaluation.judging import AT_ONCE, answer_scores
from qd2mora.evaluation.subject import open_subject
from qd2mora.objectives.head import stored_head, width_of
from qd2mora.recipe import Task
from qd2mora.run_folder import read_recipe
from qd2mora.safekeeping.places import check_file, writing


@dataclass(frozen=True)
class Scored:
    """An answer with its reward, its rank among the answers to its prompt (1 is the best), and whether it is first."""

    prompt: Any
    answer: Any
    reward: float
    rank: int
    of: int
    is_best: bool


@dataclass(frozen=True)
class _Answer:
    place: str
    prompt: Any
    answer: Any
    row: Row


def score_answers(run: str | Path, file: Path, out: Path | None = None, task: str | None = None) -> list[Scored]:
    """Score the answers of a file of rows with `prompt` and `answer`, or a list of `answers`, worded as the run's rows.

    `out`: a jsonl file for them, in the order of the file. `task`: as whose rows, the first task's where left out.

    Raises InputRefused with file and row where one cannot be
    scored, or the run has no head; NotFinite.
    """
    kind = read_recipe(run).objective.kind
    if kind != "reward":
        raise InputRefused(f"'{run}' is no reward model: it was trained with objective: {kind}")
    if out is not None:
        _check_out(out, file)
    with writing("--out", out):
        found = _ranked(*_rewards(run, file, task))
        if out is not None:
            write_atomically(out, "".join(json.dumps(asdict(each)) + "\n" for each in found))
    return found


def _check_out(out: Path, file: Path) -> None:
    """Refuse to write over the rows themselves, or over what is no earlier result. Raises InputRefused."""
    check_file(out, "--out", b"{", "scored answers")
    if not out.is_file() or not out.stat().st_size:
        return
    if file.exists() and out.samefile(file):
        raise InputRefused(f"--out: '{out}' is --file itself; name a new file")
    with out.open("rb") as lines:
        first = lines.readline()
    try:
        before = json.loads(first)
    except ValueError:
        before = None
    if not isinstance(before, dict) or not {each.name for each in fields(Scored)} <= before.keys():
        raise InputRefused(
            f"--out: '{out}' is there and holds no scored answers; name another file, or remove that one"
        )


def _rewards(run: str | Path, file: Path, task: str | None) -> tuple[list[_Answer], list[float]]:
    subject = open_subject(run)
    assert subject.run is not None
    recipe = subject.run.recipe
    names = [each.name for each in recipe.data.tasks]
    if task is not None and task not in names:
        raise InputRefused(f"--task: unknown '{task}'; the run has {', '.join(names)}")
    number = 0 if task is None else names.index(task)
    head = stored_head(subject.run.folder.adapter, width_of(subject.model))
    with worded_by(recipe.data.tasks[number], subject.tokenizer, subject.run.clock) as template:
        read = list(_read(file, None if template is None else Turns(template, "last")))
    tokens = subject.tokeniser.tokens([pair for *_, pair in read])
    answers = []
    for (place, prompt, answer, pair), each in zip(read, tokens, strict=True):
        if len(each.ids) > recipe.data.max_length:
            limit = f"data.max_length {recipe.data.max_length}"
            raise InputRefused(f"{file}, {place}: {len(each.ids)} tokens, the run scores up to {limit}")
        row = Row(number, np.asarray(each.ids, dtype=np.int32), each.bounds[-1], pair)
        answers.append(_Answer(place, prompt, answer, row))
    rewards = [0.0] * len(answers)
    order = sorted(range(len(answers)), key=lambda each: len(answers[each].row.ids))
    for start in range(0, len(order), AT_ONCE):
        numbers = order[start : start + AT_ONCE]
        scores = answer_scores(subject, [answers[each].row for each in numbers], head)
        for at, score in zip(numbers, scores.tolist(), strict=True):
            rewards[at] = score
    for answer, reward in zip(answers, rewards, strict=True):
        if not np.isfinite(reward):
            raise NotFinite(f"{file}, {answer.place}: the reward is {reward}")
    return answers, rewards


def _read(file: Path, turns: Turns | None) -> Iterator[tuple[str, Any, Any, Pair]]:
    """Yield where each answer stands, its prompt and itself as the file has them, and its text. Raises InputRefused."""
    number = 0
    for place, row in rows_of(str(file), Task(name="answers", path=str(file))):
        try:
            if isinstance(row, BadRow):
                raise row
            if not isinstance(row, dict) or "prompt" not in row or not {"answer", "answers"} & row.keys():
                raise BadRow("a row is an object with prompt and answer, or answers")
            many = row["answers"] if "answers" in row else [row["answer"]]
            if not isinstance(many, list) or not many:
                raise BadRow("field 'answers' should be a list of answers")
            for answer in many:
                content = {**dict.fromkeys(("system", "tools")), **row, "answer": answer, "label": "good"}
                (pair,), _, _ = answered(FORMAT, content, {}, turns)
                yield place, row["prompt"], answer, pair
                number += 1
        except BadRow as error:
            raise InputRefused(f"{file}, {place}: {error}") from error
    if not number:
        raise InputRefused(f"{file}: no answers to score")


def _ranked(answers: Sequence[_Answer], rewards: Sequence[float]) -> list[Scored]:
    """Rank answers among those to one prompt; of equal ones the first in the file is first."""
    prompts: dict[str, list[int]] = {}
    for number, answer in enumerate(answers):
        prompts.setdefault(json.dumps(answer.prompt, sort_keys=True), []).append(number)
    ranks: dict[int, tuple[int, int]] = {}
    for numbers in prompts.values():
        for rank, number in enumerate(sorted(numbers, key=lambda each: -rewards[each]), 1):
            ranks[number] = rank, len(numbers)
    return [
        Scored(answer.prompt, answer.answer, rewards[number], *ranks[number], ranks[number][0] == 1)
        for number, answer in enumerate(answers)
    ]


__all__ = ["Scored", "score_answers"]
