"""Asking a run, an export or a base: held-out rows of a recipe, or a published suite, task by task."""

import hashlib
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from qd2mora.data import TaskRows, prepare
from qd2mora.errors import InputRefused
from qd2mora.evaluation.asked import SCORINGS, AskedTask, ask_held_out, ask_suite
from qd2mora.evaluation.display import asking
from qd2mora.evaluation.kept import KeptAnswers, digest
from qd2mora.evaluation.rouge import rouge_l
from qd2mora.evaluation.score import Record, Score, refuse_not_finite
from qd2mora.evaluation.scoring import ROWS_AT_ONCE, score_task
from qd2mora.evaluation.subject import Subject, model_mark, open_subject
from qd2mora.evaluation.suites import PROMPTS, find_suite, suite_task_names
from qd2mora.recipe import load_recipe
from qd2mora.run_folder import is_run, read_recipe, write_json


def evaluate(
    model: str | Path,
    *,
    recipe: str | Path | None = None,
    suite: str | None = None,
    data: str | Path | None = None,
    scoring: str = "generate",
    prompt: str = "published",
    beams: int = 1,
    tasks: Collection[str] = (),
    limit: int | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
    out: str | Path | None = None,
    allow_changed: Collection[str] = (),
    is_shown: bool = False,
) -> dict[str, Score]:
    """Score a run or model folder, per task: held-out rows of `recipe`, else of the run itself, or a `suite`.

    `data`: folder of the suite's test files; `tasks`: those of them to ask, all where empty; `prompt`: the suite's
    published one, or the one of the instruction format. `scoring`: what is written counts, or the likelihood of the
    choices. `out`: a JSON file for the scores; beside it `*.rows.jsonl` keeps every answered row, and a start that
    finds it goes on. `is_shown`: draw a progress bar on a terminal.

    Raises InputRefused where there is nothing to ask, an answer is missing, or the base is another (unless
    `allow_changed`), DamagedFile, NotFinite.
    """
    _check(model, recipe, suite, data, scoring, prompt)
    rows_file = None if out is None else Path(out).with_suffix(".rows.jsonl")
    subject = open_subject(model, allow_changed)
    if suite is not None:
        assert data is not None
        numbers = task_numbers(subject, suite_task_names(suite, tasks))
        asked = ask_suite(
            suite,
            Path(data),
            subject.tokenizer,
            scoring=scoring,
            prompt=prompt,
            only=tasks,
            limit=limit,
            numbers=numbers,
        )
    else:
        settings = load_recipe(recipe) if recipe else read_recipe(model)
        asked = ask_held_out(_chosen(prepare(settings.data, subject.tokenizer, settings.train.seed), tasks), limit)
        asked = _numbered(asked, task_numbers(subject, [task.name for task in asked]))
    if not asked:
        raise InputRefused("no task of the recipe holds out rows; set data.tasks.0.validation=200")
    kept = KeptAnswers(rows_file, _question(model, asked, beams) if rows_file else {})
    scores = score_all(subject, asked, kept, beams=beams, rows_at_once=rows_at_once, is_shown=is_shown)
    if out is not None:
        write_json(Path(out), {name: score.to_json() for name, score in scores.items()})
    return scores


def score_all(
    subject: Subject,
    asked: list[AskedTask],
    kept: KeptAnswers | None = None,
    *,
    beams: int = 1,
    rows_at_once: int = ROWS_AT_ONCE,
    is_shown: bool = False,
) -> dict[str, Score]:
    """Score tasks one after another; rows that are `kept` are not asked again. Raises NotFinite, InputRefused."""
    kept = kept or KeptAnswers(None, {})
    if any(task.metric == "rouge" for task in asked):
        rouge_l()  # is it installed, before the first row is asked
    scores = {}
    with asking(asked, is_shown) as display:
        for task in asked:
            known = list(kept.records.get(task.name, []))
            display.begin(task, known)

            def on_batch(records: list[Record], task: AskedTask = task) -> None:
                refuse_not_finite(task.name, records)
                kept.add(task.name, records)
                display.batch(records)

            scores[task.name] = score_task(
                subject, task, beams=beams, rows_at_once=rows_at_once, known=known, on_batch=on_batch
            )
    return scores


def score_tasks(subject: Subject, tasks: list[TaskRows], limit: int | None = None) -> dict[str, Score]:
    """Score the held-out rows of every task that has some, the first `limit` of each, by the task's metric."""
    return score_all(subject, ask_held_out(tasks, limit))


def _check(
    model: str | Path, recipe: str | Path | None, suite: str | None, data: str | Path | None, scoring: str, prompt: str
) -> None:
    if not Path(model).is_dir():
        raise InputRefused(f"'{model}': no such folder; name a run or a model folder")
    if suite is None and recipe is None and not is_run(model):
        raise InputRefused(f"'{model}' is not a run: say with --recipe whose held-out rows to ask, or name a --suite")
    if suite is not None and recipe is not None:
        raise InputRefused("give --suite or --recipe, not both")
    if scoring not in SCORINGS:
        raise InputRefused(f"--scoring: '{scoring}' will not do: {' or '.join(SCORINGS)}")
    if prompt not in PROMPTS:
        raise InputRefused(f"--prompt: '{prompt}' will not do: {' or '.join(PROMPTS)}")
    if suite is not None:
        find_suite(suite)
        if data is None:
            raise InputRefused(f"--data: say in which folder the test files of {suite} are")
    elif scoring != "generate":
        raise InputRefused("--scoring: a recipe's tasks say it themselves: data.tasks.0.metric=choice")


def _chosen(tasks: list[TaskRows], names: Collection[str]) -> list[TaskRows]:
    known = [task.task.name for task in tasks]
    for name in names:
        if name not in known:
            raise InputRefused(f"--tasks: no task '{name}' in this recipe; there are {', '.join(known)}")
    return [task for task in tasks if not names or task.task.name in names]


def task_numbers(subject: Subject, names: list[str]) -> dict[str, int]:
    """Return the number by which a run that routes by task knows each task, by name. Raises InputRefused."""
    if subject.run is None or not subject.run.reads_task:
        return {}
    known = [task.name for task in subject.run.recipe.data.tasks]
    unknown = [name for name in names if name not in known]
    if unknown and len(known) > 1:
        raise InputRefused(
            f"this adapter routes by task and was not trained on '{unknown[0]}'; its tasks are {', '.join(known)}: "
            "choose with --tasks"
        )
    return {name: known.index(name) if name in known else 0 for name in names}


def _numbered(asked: list[AskedTask], numbers: dict[str, int]) -> list[AskedTask]:
    """Give rows the task numbers of the run: another recipe may list its tasks in another order."""
    return [
        replace(task, rows=[replace(row, task=numbers[task.name]) for row in task.rows]) if numbers else task
        for task in asked
    ]


def _question(model: str | Path, asked: list[AskedTask], beams: int) -> dict[str, object]:
    """Return what an evaluation's answers depend on, by name."""
    question: dict[str, object] = {"model": model_mark(model), "beams": beams}
    for task in asked:
        rows = hashlib.sha256(b"".join(row.ids.tobytes() + bytes([row.task % 256]) for row in task.rows)).hexdigest()
        question[f"task {task.name}"] = digest([task.metric, rows, task.labels, task.choices, task.max_new_tokens])
    return question


__all__ = ["evaluate", "score_all", "score_tasks", "task_numbers"]
