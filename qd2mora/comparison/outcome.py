"""What a comparison found: each arm's score and loss, as trained and as exported, and its difference from the first."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from qd2mora.comparison.intervals import Values, difference, interval, macro
from qd2mora.recipe import Recipe

STAGES = ("trained", "export")


@dataclass(frozen=True)
class Comparison:
    """The content of `compare.json`; `arms` in the order of the methods, the first is the reference."""

    arms: list[dict[str, Any]]
    steps: int | None
    seeds: int
    metric: str
    rows: dict[str, int]
    recipe: dict[str, Any]

    @property
    def is_share(self) -> bool:
        """Whether the score is a share of right rows."""
        return self.metric != "loss"

    def to_json(self) -> dict[str, Any]:
        """Return the numbers."""
        return {
            "arms": self.arms,
            "steps": self.steps,
            "seeds": self.seeds,
            "metric": self.metric,
            "test_rows": self.rows,
            "recipe": self.recipe,
            "verdicts": verdicts(self),
        }


def outcome(
    recipe: Recipe,
    arms: list[dict[str, Any]],
    rates: dict[str, dict[str, Any]],
    results: dict[str, list[dict[str, Any]]],
    num_steps: int | None,
) -> Comparison:
    """Sum up the results of every arm and seed."""
    first = arms[0]["name"]
    summed = []
    for arm in arms:
        entry = dict(arm) | {"rate": rates[arm["name"]]["rate"], "sweep": rates[arm["name"]]["losses"]}
        entry["at_edge"] = rates[arm["name"]].get("at_edge", False)
        for stage in STAGES if results else ():
            entry[stage] = _stage(results[arm["name"]], results[first], stage)
        summed.append(entry)
    tasks = results[first][0]["trained"] if results else {}
    metrics = {each["metric"] for each in tasks.values()}
    return Comparison(
        arms=summed,
        steps=num_steps,
        seeds=len(results[first]) if results else 0,
        metric=metrics.pop() if len(metrics) == 1 else "score",
        rows={name: len(each["values"]) for name, each in tasks.items()},
        recipe=recipe.model_dump(mode="json"),
    )


def verdicts(found: Comparison) -> list[str]:
    """Say in a line for each other arm who is ahead on the test rows' loss, and whether the interval tells."""
    lines = []
    reference = found.arms[0]
    for stage in STAGES if found.seeds else ():
        for arm in found.arms[1:]:
            if arm[stage] is None or reference[stage] is None:
                continue
            low, high = arm[stage]["loss_difference_interval"]
            mean = arm[stage]["loss_difference"]
            numbers = f"{mean:+.4f} nats a token, 95% {low:+.4f} to {high:+.4f}"
            how = "as trained" if stage == "trained" else "as exported"
            if low <= 0 <= high:
                lines.append(f"{how}: no telling {arm['name']} from {reference['name']} ({numbers})")
            else:
                word = "worse" if mean > 0 else "better"
                lines.append(f"{how}: {arm['name']} is {word} than {reference['name']} ({numbers})")
    return lines


def _stage(own: list[dict[str, Any]], first: list[dict[str, Any]], stage: str) -> dict[str, Any] | None:
    """Sum up one stage of an arm; None where it has no export."""
    if any(each.get(stage) is None for each in own):
        return None
    content: dict[str, Any] = {}
    values = {what: _stacked(own, stage, what) for what in ("values", "losses")}
    for what, name in (("values", "score"), ("losses", "loss")):
        content[name] = macro(values[what])
        content[f"{name}_interval"] = interval(values[what])
        content[f"{name}_by_task"] = {task: float(each.mean()) for task, each in values[what].items()}
        if all(each.get(stage) is not None for each in first):
            differences = difference(values[what], _stacked(first, stage, what))
            content[f"{name}_difference"] = macro(differences)
            content[f"{name}_difference_interval"] = interval(differences)
            content[f"{name}_difference_by_task"] = {task: float(each.mean()) for task, each in differences.items()}
    if stage == "export":
        content["strategies"] = [each[stage]["strategies"] for each in own]
    return content


def _stacked(results: list[dict[str, Any]], stage: str, what: str) -> Values:
    tasks = [each[stage] if stage == "trained" else each[stage]["tasks"] for each in results]
    return {name: np.asarray([each[name][what] for each in tasks], dtype=np.float64) for name in tasks[0]}


__all__ = ["STAGES", "Comparison", "outcome", "verdicts"]
