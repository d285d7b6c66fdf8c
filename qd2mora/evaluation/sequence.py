"""Runs that went on from one another: what each of them says on the tasks of all, as a matrix, and what that comes to.

R[i, t] is the score of run i on task t, which run o(t) learned first. Backward transfer (Lopez-Paz and Ranzato, arXiv
1706.08840) is the mean over the tasks of earlier runs of R[last, t] - R[o(t), t]: below zero something was forgotten.
Forgetting (Chaudhry et al., arXiv 1801.10112) is the mean of the best that any run before the last reached less the
last. Of losses a fall is the gain, so that their signs are turned.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qd2mora.disk.durable import write_json
from qd2mora.errors import InputRefused
from qd2mora.evaluation.change import Change, change_of
from qd2mora.evaluation.evaluate import EvalOptions, score_all
from qd2mora.evaluation.questions import Exam, ask
from qd2mora.evaluation.score import Score
from qd2mora.evaluation.subject import open_subject
from qd2mora.run_folder import is_run, read_recipe
from qd2mora.safekeeping.places import writing


@dataclass(frozen=True)
class RunsInTurn:
    """Scores by run and task; `learned`: the number of the run that learned a task first."""

    runs: list[str]
    scores: list[dict[str, Score]]
    learned: dict[str, int]

    @property
    def changes(self) -> dict[str, Change]:
        """What the last run made of each task of an earlier one, since the run that learned it."""
        last = self.scores[-1]
        earlier = {task: run for task, run in self.learned.items() if run < len(self.runs) - 1}
        return {task: change_of(self.scores[run][task], last[task]) for task, run in earlier.items()}

    @property
    def backward_transfer(self) -> float:
        """The mean gain since a task was learned; of tasks in different measures it means little."""
        return _mean([_gain(change) for change in self.changes.values()])

    @property
    def forgetting(self) -> float:
        """The mean of what was lost since the best of the runs before the last."""
        lost = []
        for task, change in self.changes.items():
            before = [scores[task].mean for scores in self.scores[self.learned[task] : -1]]
            lost.append(change.now - min(before) if change.metric == "loss" else max(before) - change.now)
        return _mean(lost)

    def to_json(self) -> dict[str, object]:
        """Return it as JSON has it."""
        return {
            "scores": {
                run: {task: score.to_json() for task, score in by_task.items()}
                for run, by_task in zip(self.runs, self.scores, strict=True)
            },
            "learned_by": {task: self.runs[run] for task, run in self.learned.items()},
            "change": {task: change.to_json() for task, change in self.changes.items()},
            "summary": {"backward_transfer": self.backward_transfer, "forgetting": self.forgetting},
        }


def evaluate_sequence(runs: Sequence[str], limit: int | None = None, how: EvalOptions | None = None) -> RunsInTurn:
    """Ask every run the held-out rows of all, in the order in which they were trained; `limit`: rows of a task.

    A task that several runs learned counts for the first, by its name. Raises InputRefused where a run cannot be asked
    another's tasks, DamagedFile, NotFinite.
    """
    how = how or EvalOptions()
    how.refuse_beams("--sequence")
    if len(set(runs)) < 2 or len(set(runs)) < len(runs):
        raise InputRefused(f"--sequence: {', '.join(runs)}: name two or more different runs, in the order of training")
    for run in runs:
        if not is_run(run):
            raise InputRefused(f"--sequence: '{run}' is not a run: it holds no recipe.yaml")
    recipes = [read_recipe(run) for run in runs]
    names = [[task.name for task in recipe.data.tasks] for recipe in recipes]
    scores: list[dict[str, Score]] = []
    learned: dict[str, int] = {}
    with writing("--out", how.place):
        for run in runs:
            subject, found = open_subject(run, how.allow_changed), dict[str, Score]()
            for number, recipe in enumerate(recipes):
                known = {task for earlier in names[:number] for task in earlier}
                own = tuple(name for name in names[number] if name not in known)
                if own:
                    asked = ask(Exam(recipe=recipe, tasks=own, limit=limit), subject)
                    learned |= {task.name: number for task in asked}
                    found |= score_all(subject, asked, rows_at_once=how.rows_at_once, is_shown=how.is_shown)
            scores.append(found)
        told = RunsInTurn(list(runs), scores, learned)
        if not told.changes:
            raise InputRefused("--sequence: no task of an earlier run holds out rows; set data.tasks.0.validation=200")
        if how.place is not None:
            write_json(how.place, told.to_json())
    return told


def _gain(change: Change) -> float:
    return -change.change if change.metric == "loss" else change.change


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


__all__ = ["RunsInTurn", "evaluate_sequence"]
