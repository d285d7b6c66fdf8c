"""One trained arm: its scores row by row on the test rows, as trained and as its best static export."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qd2mora.comparison.comparison_folder import remove_work
from qd2mora.evaluation import Exam, Score, Subject, ask, open_subject, score_all, suite_task_names
from qd2mora.merging import STRATEGIES, ExportOptions, merge
from qd2mora.merging.export_scope import export_scope
from qd2mora.mixture import MixtureConfig
from qd2mora.run_folder import RunFolder, read_recipe


@dataclass(frozen=True)
class RowScores:
    """A task's test rows in their order: what the metric gives each, and its nats a token."""

    metric: str
    values: list[float]
    losses: list[float]


ByTask = dict[str, RowScores]


@dataclass(frozen=True)
class ExportScores:
    """The best static export of a run, scored; `strategies` by task, or of all tasks."""

    strategies: dict[str, str]
    tasks: ByTask


@dataclass(frozen=True)
class ArmScores:
    """What one arm reached with one seed; no export where none was asked for, or no weights can take the update."""

    rate: float
    seed: int
    trained: ByTask
    export: ExportScores | None = None


def score_trained(folder: Path, exam: Exam) -> ByTask:
    """Score a run on the test rows, by task."""
    return _by_row(_scores(open_subject(folder), exam))


def score_best_export(folder: Path, exam: Exam, strategies: Sequence[str]) -> ExportScores | None:
    """Export a run with each strategy, and score the best; None where no weights can take its update.

    The best has the smallest loss on the run's own held-out rows, never on the test rows. A method that routes by task
    is exported for each task, and each is scored on its own.
    """
    recipe = read_recipe(folder)
    known = [task.name for task in recipe.data.tasks]
    scope = export_scope(MixtureConfig.from_recipe(recipe.adapter, len(known)), len(known))
    if scope in ("none", "vector", "spans", "magnitudes"):
        return None
    names: list[str | None] = [None]
    if scope == "task":
        names = [*(suite_task_names(exam.suite, exam.tasks) if exam.suite else known)]
    scores: dict[str, Score] = {}
    chosen = {}
    for name in names:
        place, strategy = _best_of(folder, strategies, name)
        chosen[name or "all"] = strategy
        asked = exam if name is None else replace(exam, tasks=(name,))
        scores |= _scores(replace(open_subject(place), run=None), asked)
        remove_work(place)
    return ExportScores(chosen, _by_row(scores))


def last_losses(folder: Path) -> dict[str, float]:
    """Return the last held-out losses of a finished run, by task."""
    lines = RunFolder(folder).metric_lines()
    losses: dict[str, float] = [line["eval_loss"] for line in lines if "eval_loss" in line][-1]
    return losses


def _best_of(folder: Path, strategies: Sequence[str], task: str | None) -> tuple[Path, str]:
    """Return the folder of the best export, or of the first that is exact, and its strategy."""
    tried: dict[str, tuple[float, Path]] = {}
    everything = [name for name, strategy in STRATEGIES.items() if task is not None or not strategy.one_task]
    for strategy in strategies or everything:
        place = folder.parent / f"{folder.name}-{strategy}"
        # What an earlier start left half done.
        remove_work(place)
        export = merge(folder, place, ExportOptions(strategy=strategy, task=task, keeps=False))
        assert export.fidelity is not None  # there are rows to choose by
        tried[export.strategy] = (export.fidelity.merged, place)
        if export.exact:  # no other keeps more
            break
    best = min(tried, key=lambda name: tried[name][0])
    for name, (_, place) in tried.items():
        if name != best:
            remove_work(place)
    return tried[best][1], best


def _scores(subject: Subject, exam: Exam) -> dict[str, Score]:
    return score_all(subject, ask(exam, subject), is_shown=True)


def _by_row(scores: dict[str, Score]) -> ByTask:
    return {
        name: RowScores(score.metric, score.values, [record.loss / record.labels for record in score.records])
        for name, score in scores.items()
    }


__all__ = ["ArmScores", "ByTask", "ExportScores", "RowScores", "last_losses", "score_best_export", "score_trained"]
