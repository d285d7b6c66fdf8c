"""One trained arm: its scores row by row on the test rows, as trained and as its best static export."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qd2mora.data import prepare
from qd2mora.errors import InputRefused
from qd2mora.evaluation import (
    AskedTask,
    Score,
    Subject,
    ask_held_out,
    ask_suite,
    open_subject,
    score_all,
    suite_task_names,
    task_numbers,
)
from qd2mora.merging import STRATEGIES, merge
from qd2mora.mixture import MixtureConfig
from qd2mora.mixture.method import TASK
from qd2mora.recipe import Recipe
from qd2mora.run_folder import RunFolder


@dataclass(frozen=True)
class Exam:
    """What arms are tested on: the held-out rows of `recipe`, or the files of a `suite` in the folder `data`.

    limit: rows of each task; tasks: those of the suite, all where empty; scoring: as `evaluate` takes it.
    """

    recipe: Recipe
    limit: int | None = None
    suite: str | None = None
    data: str | None = None
    tasks: tuple[str, ...] = ()
    scoring: str = "generate"

    def asked(self, subject: Subject, only: str | None = None) -> list[AskedTask]:
        """Return the tasks to ask, or the one named. Raises InputRefused."""
        if self.suite is None:
            tasks = prepare(self.recipe.data, subject.tokenizer, self.recipe.train.seed)
            asked = ask_held_out([each for each in tasks if only in (None, each.task.name)], self.limit)
        else:
            names = [each for each in suite_task_names(self.suite, self.tasks) if only in (None, each)]
            asked = ask_suite(
                self.suite,
                Path(self.data or ""),
                subject.tokenizer,
                scoring=self.scoring,
                only=names,
                limit=self.limit,
                numbers=task_numbers(subject, names),
            )
        if not asked:
            raise InputRefused("no task of the recipe holds out rows; set data.tasks.0.validation=200")
        return asked


def score_run(folder: Path, exam: Exam) -> dict[str, Any]:
    """Score a run on the test rows, by task: values and losses a token of each row."""
    return _by_row(_scores(open_subject(folder), exam))


def best_export(folder: Path, exam: Exam, strategies: tuple[str, ...]) -> dict[str, Any] | None:
    """Export a run with each strategy, and score the best; None where no weights can take its update.

    The best has the smallest loss on the run's own held-out rows, never on the test rows. A method that routes by task
    is exported for each task, and each is scored on its own.
    """
    recipe = exam.recipe
    config = MixtureConfig.from_recipe(recipe.adapter, len(recipe.data.tasks))
    if config.row.placement == "block" or config.reads_vector:
        return None
    names: list[str | None] = [None]
    if config.depends_on == TASK and config.reads_task and len(recipe.data.tasks) > 1:
        tested = suite_task_names(exam.suite, exam.tasks) if exam.suite else [task.name for task in recipe.data.tasks]
        names = [*tested]
    scores: dict[str, Score] = {}
    chosen = {}
    for name in names:
        place, strategy = _best_of(folder, strategies, name)
        chosen[name or "all"] = strategy
        found = _scores(replace(open_subject(place), run=None), exam, name)
        scores |= found
        shutil.rmtree(place)
    return {"strategies": chosen, "tasks": _by_row(scores)}


def last_losses(folder: Path) -> dict[str, float]:
    """Return the last held-out losses of a finished run, by task."""
    lines = [json.loads(line) for line in RunFolder(folder).metrics.read_text(encoding="utf-8").splitlines()]
    losses: dict[str, float] = [line["eval_loss"] for line in lines if "eval_loss" in line][-1]
    return losses


def _best_of(folder: Path, strategies: tuple[str, ...], task: str | None) -> tuple[Path, str]:
    tried: dict[str, tuple[float, Path]] = {}
    for strategy in strategies or tuple(STRATEGIES):
        place = folder.parent / f"{folder.name}-{strategy}"
        shutil.rmtree(place, ignore_errors=True)
        export = merge(folder, place, strategy=strategy, task=task)
        assert export.fidelity is not None  # there are rows to choose by
        tried[export.strategy] = (export.fidelity.merged, place)
        if export.exact:
            break
    best = min(tried, key=lambda name: tried[name][0])
    for name, (_, place) in tried.items():
        if name != best:
            shutil.rmtree(place)
    return tried[best][1], best


def _scores(subject: Subject, exam: Exam, only: str | None = None) -> dict[str, Score]:
    return score_all(subject, exam.asked(subject, only))


def _by_row(scores: dict[str, Score]) -> dict[str, Any]:
    return {
        name: {
            "metric": score.metric,
            "values": score.values,
            "losses": [record.loss / record.labels for record in score.records],
        }
        for name, score in scores.items()
    }


__all__ = ["Exam", "best_export", "last_losses", "score_run"]
