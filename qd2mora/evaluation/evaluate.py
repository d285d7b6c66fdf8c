"""Scoring a run, an export or a base: held-out rows of a recipe, or a published suite, task by task."""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from qd2mora.base.files import is_gguf
from qd2mora.disk.durable import write_json
from qd2mora.errors import InputRefused
from qd2mora.evaluation.answer_file import AnswerFile, check_scores_place, digest
from qd2mora.evaluation.display import asking
from qd2mora.evaluation.questions import AskedTask, Exam, ask, check_exam
from qd2mora.evaluation.rouge import rouge_l
from qd2mora.evaluation.score import Record, Score, refuse_not_finite
from qd2mora.evaluation.scoring import ROWS_AT_ONCE, score_task
from qd2mora.evaluation.subject import Subject, model_mark
from qd2mora.evaluation.ways import Way, open_in_way
from qd2mora.recipe import load_recipe
from qd2mora.run_folder import is_run, read_recipe
from qd2mora.safekeeping.places import writing


@dataclass(frozen=True)
class EvalOptions:
    """How models are asked, whatever is asked of them.

    out: a JSON file for what is found. allow_changed: what of a run may not be as it was. is_shown: draw a progress bar
    on a terminal.
    """

    beams: int = 1
    rows_at_once: int = ROWS_AT_ONCE
    out: str | Path | None = None
    allow_changed: Collection[str] = ()
    is_shown: bool = False

    @property
    def place(self) -> Path | None:
        """The file for what is found."""
        return None if self.out is None else Path(self.out)

    def refuse_beams(self, option: str) -> None:
        """Refuse a beam search where all is written greedily. Raises InputRefused."""
        if self.beams > 1:
            raise InputRefused(f"--beams: {self.beams} does not go with {option}, which writes greedily; leave it out")


def evaluate(model: str | Path, exam: Exam | None = None, how: EvalOptions | None = None) -> dict[str, Score]:
    """Score a run or model folder, per task; a run is asked its own held-out rows where the exam names no others.

    Beside `how.out`, `*.rows.jsonl` keeps every answered row, and a start that finds it goes on.

    Raises InputRefused where there is nothing to ask, an answer is missing, or the base is another (unless
    `allow_changed`), DamagedFile, NotFinite.
    """
    exam, how = whole_exam(model, exam or Exam()), how or EvalOptions()
    if how.beams > 1 and exam.way is not None and not exam.way.is_plain:
        raise InputRefused("--beams: a beam search is a way of its own; leave it out beside --contrast and --samples")
    place, rows = how.place, None
    if place is not None:
        rows = place.with_suffix(".rows.jsonl")
        check_scores_place(place, rows)
    with writing("--out", place, rows):
        told = exam.way
        subject, way = open_in_way(model, told, how.allow_changed)
        asked = ask(replace(exam, way=way), subject)
        answers = AnswerFile()
        if rows is not None:
            answers = AnswerFile(rows, question_of(model, asked, how.beams, told))
        scores = score_all(
            subject, asked, answers, beams=how.beams, rows_at_once=how.rows_at_once, is_shown=how.is_shown
        )
        if place is not None:
            write_json(place, {name: score.to_json() for name, score in scores.items()})
    return scores


def score_all(
    subject: Subject,
    asked: list[AskedTask],
    answers: AnswerFile | None = None,
    *,
    beams: int = 1,
    rows_at_once: int = ROWS_AT_ONCE,
    is_shown: bool = False,
) -> dict[str, Score]:
    """Score tasks one after another; rows that `answers` holds are not asked again. Raises NotFinite, InputRefused."""
    answers = answers or AnswerFile()
    if any(task.metric == "rouge" for task in asked):
        rouge_l()  # is it installed, before the first row is asked
    scores = {}
    with asking(asked, is_shown) as display:
        for task in asked:
            known = list(answers.records.get(task.name, []))
            display.begin(task, known)

            def on_batch(records: list[Record], task: AskedTask = task) -> None:
                refuse_not_finite(task.name, records)
                answers.add(task.name, records)
                display.batch(records)

            scores[task.name] = score_task(
                subject, task, beams=beams, rows_at_once=rows_at_once, known=known, on_batch=on_batch
            )
    return scores


def whole_exam(model: str | Path, exam: Exam) -> Exam:
    """Return an exam that names its rows, a run's own where it named none. Raises InputRefused."""
    if not Path(model).is_dir() and not is_gguf(str(model)):
        raise InputRefused(f"'{model}': no such folder; name a run, a model folder or a GGUF file")
    if exam.suite is None and exam.recipe is None and not is_run(model):
        raise InputRefused(f"'{model}' is not a run: say with --recipe whose held-out rows to ask, or name a --suite")
    check_exam(exam)
    if exam.suite is not None:
        return exam
    recipe = exam.recipe
    if recipe is None:
        recipe = read_recipe(model)
    elif isinstance(recipe, Path):
        recipe = load_recipe(recipe)
    return replace(exam, recipe=recipe)


def question_of(model: str | Path, asked: list[AskedTask], beams: int, way: Way | None) -> dict[str, object]:
    """Return what an evaluation's answers depend on, by name."""
    question: dict[str, object] = {"model": model_mark(model), "beams": beams}
    if way is not None:
        question["way"] = digest(way.question)
    for task in asked:
        lines = [line for row in task.rows for line in row.lines]
        rows = hashlib.sha256(b"".join(line.ids.tobytes() + bytes([line.task % 256]) for line in lines)).hexdigest()
        asking: list[object] = [task.metric, rows, task.labels, task.choices, task.max_new_tokens]
        if task.judge is not None:
            asking += [sorted(vars(task.judge.objective).items()), sorted(task.judge.reference.items())]
        question[f"task {task.name}"] = digest(asking)
    return question


__all__ = ["EvalOptions", "evaluate", "question_of", "score_all", "whole_exam"]
