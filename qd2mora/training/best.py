"""The best adapter of a run so far, overall and per task: recorded with the progress, and kept as a copy.

`best/best.json` names the step and the value of each; `best/step-N/` holds the adapter of such a step, in the layout
and under the seal of `adapter/`. The record is part of every checkpoint, so that a resumed run judges as an unbroken
one. A copy goes only when no checkpoint on disk names it any more: a resume may fall back to the older record.

A task is judged by the metric it names, else by its held-out loss; the whole by the mean over tasks, of metrics where
every task names one, else of losses.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qd2mora.disk.durable import write_json
from qd2mora.disk.owned import foreign_in
from qd2mora.disk.sealed import MANIFEST, open_manifest, read_listed
from qd2mora.disk.staged import remove_folder, staged_folder
from qd2mora.errors import DamagedFile
from qd2mora.evaluation import Score
from qd2mora.safekeeping.inventory import ADAPTER_NAMES
from qd2mora.training.progress import Best, Progress

OVERALL = "*"  # no task can be called so
_PREFIX = "step-"


@dataclass
class BestKeeper:
    """Judges evaluations, and keeps the adapters of the best; `save` writes the adapter as it is into a folder."""

    folder: Path
    keep: str
    save: Callable[[Path], None]
    is_main: bool = True
    _of_checkpoint: set[int] = field(default_factory=set)

    def resumed(self, progress: Progress) -> None:
        """Remember what the checkpoint on disk names."""
        self._of_checkpoint = self._named(progress)

    def note(self, progress: Progress, losses: Mapping[str, float], scores: Mapping[str, Score]) -> None:
        """Judge the evaluation after the step of `progress`; record and keep what is better. Raises OSError."""
        values = judged(losses, scores)
        better = {name: value for name, value in values.items() if _is_better(value, progress.best.get(name))}
        if OVERALL in values:
            # Only where the whole was judged: an evaluation without losses is no sign of stalling.
            progress.stale += 1
        if OVERALL in better:
            progress.stale = 0
        for name, (value, by) in better.items():
            progress.best[name] = (progress.step, value, by)
        if better and self.is_main and self.keep != "none":
            if progress.step in self._named(progress):
                self.folder.mkdir(exist_ok=True)
                self.save(self._place(progress.step))
            self._write(progress)

    def settle(self, progress: Progress) -> None:
        """Drop the copies that neither the checkpoint on disk nor the one begun now names. Raises OSError."""
        named = self._named(progress)
        if self.is_main and self.folder.is_dir():
            for path in self.folder.glob(f"{_PREFIX}*"):
                step = path.name.removeprefix(_PREFIX)
                is_named = step in map(str, named | self._of_checkpoint)
                if not is_named and step.isdecimal() and foreign_in(path, ADAPTER_NAMES) is None:
                    remove_folder(path, ADAPTER_NAMES)
        self._of_checkpoint = named

    def copy_to(self, target: Path, progress: Progress) -> int | None:
        """Put the best adapter overall in `target`'s place; return its step, None where none was kept.

        Raises DamagedFile where the copy is not what was written.
        """
        if OVERALL not in progress.best:
            return None
        step = progress.best[OVERALL][0]
        source = self._place(step)
        if not source.is_dir():
            raise DamagedFile(f"{source}, the best adapter, is gone; set train.final=last")
        manifest = open_manifest(source, lambda name: not name.endswith(".md"))
        with staged_folder(target, ADAPTER_NAMES) as stage:
            for name in manifest["files"]:
                # Byte for byte under its own manifest: the bytes that were compared are those that are written.
                (stage / name).write_bytes(read_listed(source, manifest, name))
            (stage / MANIFEST).write_bytes((source / MANIFEST).read_bytes())
        return step

    def _named(self, progress: Progress) -> set[int]:
        names = {"none": (), "overall": (OVERALL,)}.get(self.keep, tuple(progress.best))
        return {progress.best[name][0] for name in names if name in progress.best}

    def _place(self, step: int) -> Path:
        return self.folder / f"{_PREFIX}{step}"

    def _write(self, progress: Progress) -> None:
        entries = {name: {"step": step, "value": value, "by": by} for name, (step, value, by) in progress.best.items()}
        write_json(self.folder / "best.json", {"overall": entries.pop(OVERALL, None), "tasks": entries})


def judged(losses: Mapping[str, float], scores: Mapping[str, Score]) -> dict[str, tuple[float, str]]:
    """Return of each task, and of the whole, the value that is judged and what it is."""
    if not losses:
        return {}
    values: dict[str, tuple[float, str]] = {name: (loss, "loss") for name, loss in losses.items()}
    values |= {name: (score.mean, score.metric) for name, score in scores.items() if name in losses}
    if losses.keys() <= scores.keys():
        whole = (sum(score.mean for score in scores.values()) / len(scores), "mean score")
    else:
        whole = (sum(losses.values()) / len(losses), "loss")
    return {OVERALL: whole, **values}


def _is_better(value: tuple[float, str], before: Best | None) -> bool:
    number, by = value
    # Nothing compares as better than NaN: once the best, it would stay so.
    if not math.isfinite(number):
        return False
    if before is None:
        return True
    if by == "loss":
        return number < before[1]
    return number > before[1]


__all__ = ["OVERALL", "BestKeeper", "judged"]
