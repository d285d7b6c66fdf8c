"""What a run gained and forgot: the same rows asked of two models, and the change of each task, paired row by row.

A row's difference is free of how hard the row is, so that its interval is narrower than those of the two scores. Where
a task is measured by its loss a fall is a gain, in all else a rise is.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from qd2mora.disk.durable import write_json
from qd2mora.errors import InputRefused
from qd2mora.evaluation.answer_file import AnswerFile, check_scores_place
from qd2mora.evaluation.evaluate import EvalOptions, question_of, score_all, whole_exam
from qd2mora.evaluation.questions import Exam, ask
from qd2mora.evaluation.score import Score, bootstrap
from qd2mora.evaluation.subject import Subject, open_subject
from qd2mora.safekeeping.places import writing

BASE = "base"
"""Asks for the run's own base, its adapter off."""


@dataclass(frozen=True)
class Change:
    """One task's number before and now, and its change with the 95% interval of the bootstrap over rows, paired.

    lost, won: rows that were right and are not, and the other way round, where rows are right or wrong.
    """

    metric: str
    rows: int
    before: float
    now: float
    interval: tuple[float, float]
    lost: int | None = None
    won: int | None = None

    @property
    def change(self) -> float:
        return self.now - self.before

    @property
    def verdict(self) -> str:
        """Say whether it is forgotten or gained; nothing where the interval holds zero."""
        low, high = self.interval
        if low <= 0 <= high:
            return ""
        return "gained" if (high < 0) == (self.metric == "loss") else "forgotten"

    def to_json(self) -> dict[str, object]:
        """Return it as JSON has it."""
        return asdict(self) | {"change": self.change, "verdict": self.verdict}


def change_of(before: Score, now: Score) -> Change:
    """Return the change between two scores of the same rows."""
    lost = won = None
    if now.metric == "loss":
        losses = [two.loss - one.loss for one, two in zip(before.records, now.records, strict=True)]
        interval = bootstrap(losses, [record.labels for record in now.records])
    else:
        interval = bootstrap([two - one for one, two in zip(before.values, now.values, strict=True)])
    if now.is_share:
        pairs = list(zip(before.values, now.values, strict=True))
        lost, won = sum(one > two for one, two in pairs), sum(one < two for one, two in pairs)
    return Change(now.metric, now.rows, before.mean, now.mean, interval, lost, won)


def evaluate_against(
    model: str | Path, against: str, exam: Exam | None = None, how: EvalOptions | None = None
) -> dict[str, Change]:
    """Ask two models the rows of an exam; return the change of each task from `against` to `model`.

    against: a run, a model's folder, or `base`, the run's own with its adapter off. Beside `how.out` the answers of
    both are kept, and a start that finds them goes on.

    Raises InputRefused where one of them cannot be asked these rows, DamagedFile, NotFinite.
    """
    exam, how = whole_exam(model, exam or Exam()), how or EvalOptions()
    way = exam.way
    if way is not None and (way.contrast is not None or way.ensemble is not None):
        raise InputRefused("--against: two models alone are compared; leave out --contrast and --ensemble")
    place, scores = how.place, []
    files = _files_beside(place)
    with writing("--out", place, *files):
        # One after the other: two models at once may be more than memory holds.
        for number, path in enumerate((against, str(model))):
            with asked_as(str(model), path, how.allow_changed) as subject:
                asked = ask(exam, subject)
                answers = AnswerFile()
                if files:
                    question = question_of(model if path == BASE else path, asked, how.beams, way)
                    answers = AnswerFile(files[number], question | {"adapter": "off" if path == BASE else "on"})
                found = score_all(
                    subject, asked, answers, beams=how.beams, rows_at_once=how.rows_at_once, is_shown=how.is_shown
                )
                scores.append(found)
        changes = {name: change_of(scores[0][name], score) for name, score in scores[1].items()}
        if place is not None:
            write_json(place, {name: change.to_json() for name, change in changes.items()})
    return changes


def _files_beside(place: Path | None) -> list[Path]:
    """Return where the answers of both are kept, nowhere where no place is named. Raises InputRefused."""
    files = [] if place is None else [place.with_suffix(f".{kind}.rows.jsonl") for kind in ("against", "model")]
    for file in files:
        assert place is not None
        check_scores_place(place, file)
    return files


@contextmanager
def asked_as(model: str, path: str, allow_changed: Collection[str]) -> Iterator[Subject]:
    """Yield what lies at `path`, or the base of `model`. Raises InputRefused."""
    if path != BASE:
        yield open_subject(path, allow_changed)
        return
    subject = open_subject(model, allow_changed)
    if not subject.is_adapted:
        raise InputRefused(f"--against: '{model}' has no adapter to turn off; name the folder of its base")
    with subject.without_adapter():
        yield subject


__all__ = ["BASE", "Change", "asked_as", "change_of", "evaluate_against"]
