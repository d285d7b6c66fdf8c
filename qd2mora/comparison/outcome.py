"""What a comparison found: each arm's score and loss, as trained and as exported, and its difference from the first."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np

from qd2mora.comparison.arm_scores import ArmScores, ByTask, RowScores
from qd2mora.comparison.intervals import Values, difference, interval, macro
from qd2mora.comparison.matched_arms import Arm
from qd2mora.comparison.tuning import Tuned
from qd2mora.recipe import Recipe

STAGES = ("trained", "export")
Json = dict[str, object]


@dataclass(frozen=True)
class TimedArm:
    """An arm at equal time: its steps, the seconds that one takes, and its scores with each seed."""

    steps: int
    seconds_a_step: float
    results: list[ArmScores]


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks, seeds and rows, its 95% interval, and the mean of each task."""

    mean: float
    interval: tuple[float, float]
    by_task: dict[str, float]

    def to_json(self, name: str) -> Json:
        """Return the numbers under keys that begin with `name`."""
        return {name: self.mean, f"{name}_interval": self.interval, f"{name}_by_task": self.by_task}


@dataclass(frozen=True)
class StageOutcome:
    """One stage of an arm; the differences are from the first arm, None where that has no such stage.

    strategies: of an export, by task, a seed each.
    """

    score: Estimate
    loss: Estimate
    score_difference: Estimate | None
    loss_difference: Estimate | None
    strategies: list[dict[str, str]] | None = None

    def to_json(self) -> Json:
        content = self.score.to_json("score")
        if self.score_difference is not None:
            content |= self.score_difference.to_json("score_difference")
        content |= self.loss.to_json("loss")
        if self.loss_difference is not None:
            content |= self.loss_difference.to_json("loss_difference")
        if self.strategies is not None:
            content["strategies"] = self.strategies
        return content


@dataclass(frozen=True)
class ArmOutcome:
    """One arm, how it was tuned, and what it reached: `stages` is empty after a sweep alone, None for one it has not.

    timed: steps and seconds of a step, where arms were trained for equal time; `at_equal_time` is what came of that.
    """

    arm: Arm
    tuned: Tuned
    stages: dict[str, StageOutcome | None]
    timed: tuple[int, float] | None = None
    at_equal_time: StageOutcome | None = None

    @property
    def name(self) -> str:
        return self.arm.name

    def to_json(self) -> Json:
        content: Json = {
            "name": self.name,
            "adapter": self.arm.adapter.model_dump(exclude_none=True),
            "parameters": self.arm.parameters,
            "notes": list(self.arm.notes),
            "rate": self.tuned.setting.rate,
            "setting": asdict(self.tuned.setting),
            "sweep": _finite(self.tuned.losses),
            "rungs": [{"steps": rung.steps, "losses": _finite(rung.losses)} for rung in self.tuned.rungs],
            "at_edge": "rate" in self.tuned.edges,
            "edges": list(self.tuned.edges),
        }
        for name, stage in self.stages.items():
            content[name] = None if stage is None else stage.to_json()
        if self.timed is not None and self.at_equal_time is not None:
            steps, seconds = self.timed
            content["equal_time"] = {"steps": steps, "seconds_a_step": seconds} | self.at_equal_time.to_json()
        return content


@dataclass(frozen=True)
class Comparison:
    """The content of `compare.json`; `arms` in the order of the methods, the first is the reference."""

    arms: list[ArmOutcome]
    steps: int | None
    seeds: int
    metric: str
    rows: dict[str, int]
    recipe: Recipe

    @property
    def is_share(self) -> bool:
        """Whether the score is a share of right rows."""
        return self.metric != "loss"

    def to_json(self) -> Json:
        return {
            "arms": [arm.to_json() for arm in self.arms],
            "steps": self.steps,
            "seeds": self.seeds,
            "metric": self.metric,
            "test_rows": self.rows,
            "recipe": self.recipe.model_dump(mode="json"),
            "verdicts": verdicts(self),
        }


def outcome(
    recipe: Recipe,
    arms: list[Arm],
    tunings: dict[str, Tuned],
    results: dict[str, list[ArmScores]],
    num_steps: int | None,
    timed: dict[str, TimedArm],
) -> Comparison:
    """Sum up the results of every arm and seed; none where the sweep was all, or arms were not timed."""
    reference = results.get(arms[0].name, [])
    summed = []
    for arm in arms:
        stages = {stage: _stage(results[arm.name], reference, stage) for stage in STAGES if results}
        own = ArmOutcome(arm, tunings[arm.name], stages)
        if timed:
            its, first = timed[arm.name], timed[arms[0].name]
            at_equal_time = _stage(its.results, first.results, "trained")
            own = replace(own, timed=(its.steps, its.seconds_a_step), at_equal_time=at_equal_time)
        summed.append(own)
    tasks = reference[0].trained if reference else {}
    metrics = {each.metric for each in tasks.values()}
    return Comparison(
        arms=summed,
        steps=num_steps,
        seeds=len(reference),
        metric=metrics.pop() if len(metrics) == 1 else "score",
        rows={name: len(each.values) for name, each in tasks.items()},
        recipe=recipe,
    )


def _finite(losses: dict[str, float]) -> dict[str, float | None]:
    """Return losses as JSON has them: None where a training diverged."""
    return {name: loss if math.isfinite(loss) else None for name, loss in losses.items()}


def verdicts(found: Comparison) -> list[str]:
    """Say in a line for each other arm who is ahead on the test rows' loss, and whether the interval tells."""
    lines = []
    for stage, how in zip(STAGES, ("as trained", "as exported"), strict=True):
        for arm in found.arms[1:]:
            own = arm.stages.get(stage)
            if own is not None and own.loss_difference is not None:
                lines.append(f"{how}: {_verdict(arm.name, found.arms[0].name, own.loss_difference)}")
    for arm in found.arms[1:]:
        if arm.at_equal_time is not None and arm.at_equal_time.loss_difference is not None:
            told = _verdict(arm.name, found.arms[0].name, arm.at_equal_time.loss_difference)
            lines.append(f"at equal time: {told}")
    return lines


def _verdict(name: str, reference: str, loss: Estimate) -> str:
    low, high = loss.interval
    numbers = f"{loss.mean:+.4f} nats a token, 95% {low:+.4f} to {high:+.4f}"
    # An interval that holds zero decides nothing, however large the mean.
    if low <= 0 <= high:
        return f"no telling {name} from {reference} ({numbers})"
    word = "worse" if loss.mean > 0 else "better"
    return f"{name} is {word} than {reference} ({numbers})"


def _stage(own: list[ArmScores], reference: list[ArmScores], stage: str) -> StageOutcome | None:
    """Sum up one stage of an arm; None where it has no export."""
    rows, first = _rows(own, stage), _rows(reference, stage)
    if rows is None:
        return None
    scores, losses = _stacked(rows, lambda each: each.values), _stacked(rows, lambda each: each.losses)
    score_difference = loss_difference = None
    if first is not None:
        score_difference = _estimate(difference(scores, _stacked(first, lambda each: each.values)))
        loss_difference = _estimate(difference(losses, _stacked(first, lambda each: each.losses)))
    strategies = None
    if stage == "export":
        strategies = [each.export.strategies for each in own if each.export is not None]
    return StageOutcome(_estimate(scores), _estimate(losses), score_difference, loss_difference, strategies)


def _rows(results: list[ArmScores], stage: str) -> list[ByTask] | None:
    """Return the scores of every seed at a stage, None where one has none."""
    if stage == "trained":
        return [each.trained for each in results]
    exports = [each.export.tasks for each in results if each.export is not None]
    if len(exports) < len(results):
        return None
    return exports


def _stacked(seeds: list[ByTask], numbers: Callable[[RowScores], list[float]]) -> Values:
    return {name: np.asarray([numbers(each[name]) for each in seeds], dtype=np.float64) for name in seeds[0]}


def _estimate(values: Values) -> Estimate:
    by_task = {task: float(each.mean()) for task, each in values.items()}
    return Estimate(macro(values), interval(values), by_task)


__all__ = ["STAGES", "ArmOutcome", "Comparison", "Estimate", "StageOutcome", "TimedArm", "outcome", "verdicts"]
