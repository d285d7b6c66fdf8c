"""One trained arm: its scores row by row on the test rows, as trained and as its best static export."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from qd2mora.data import prepare
from qd2mora.errors import InputRefused
from qd2mora.evaluation import Score, Subject, ask_held_out, open_subject, score_all
from qd2mora.merging import STRATEGIES, merge
from qd2mora.mixture import MixtureConfig
from qd2mora.mixture.method import TASK
from qd2mora.recipe import Recipe
from qd2mora.run_folder import RunFolder


def score_run(folder: Path, asked: Recipe, limit: int | None) -> dict[str, Any]:
    """Score a run on the held-out rows of `asked`, by task: values and losses a token of each row."""
    return _by_row(_scores(open_subject(folder), asked, limit))


def best_export(folder: Path, asked: Recipe, strategies: tuple[str, ...], limit: int | None) -> dict[str, Any] | None:
    """Export a run with each strategy, and score the best; None where no weights can take its update.

    The best has the smallest loss on the run's own held-out rows, never on those of `asked`. A method that routes by
    task is exported for each task, and each is scored on its own.
    """
    config = MixtureConfig.from_recipe(asked.adapter, len(asked.data.tasks))
    if config.row.placement == "block" or config.reads_vector:
        return None
    by_task = config.depends_on == TASK and config.reads_task and len(asked.data.tasks) > 1
    names = [task.name for task in asked.data.tasks] if by_task else [None]
    scores: dict[str, Score] = {}
    chosen = {}
    for name in names:
        place, strategy = _best_of(folder, strategies, name)
        chosen[name or "all"] = strategy
        found = _scores(replace(open_subject(place), run=None), asked, limit, name)
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


def _scores(subject: Subject, asked: Recipe, limit: int | None, task: str | None = None) -> dict[str, Score]:
    tasks = [
        each
        for each in prepare(asked.data, subject.tokenizer, asked.train.seed)
        if task is None or each.task.name == task
    ]
    scores = score_all(subject, ask_held_out(tasks, limit))
    if not scores:
        raise InputRefused("no task of the recipe holds out rows; set data.tasks.0.validation=200")
    return scores


def _by_row(scores: dict[str, Score]) -> dict[str, Any]:
    return {
        name: {
            "metric": score.metric,
            "values": score.values,
            "losses": [record.loss / record.labels for record in score.records],
        }
        for name, score in scores.items()
    }


__all__ = ["best_export", "last_losses", "score_run"]
