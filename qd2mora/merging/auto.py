"""The default: the best quality for at most a fifth of what training cost, and a word on what was done.

Least squares and mean gates come from one pass over calibration rows and cost next to nothing; what is left of the
fifth goes into distillation from the better of them. Rows that nothing was fitted to decide. Cost is counted in rows,
forward and backward, never by the clock, so that the same run gives the same export on any machine.
"""

from qd2mora.merging import core_lsq, mean_gate
from qd2mora.merging.distill import ROWS_A_STEP, Teacher, distill, mean_divergence
from qd2mora.merging.static_updates import of_cores
from qd2mora.merging.strategy_inputs import StrategyInputs, rows_of
from qd2mora.mixture.low_rank import LowRank

SHARE = 0.2
MIN_STEPS = 10


def auto(inputs: StrategyInputs) -> dict[str, LowRank]:
    """Return the static updates nearest to the routed model on checking rows."""
    moments = inputs.moments(with_mixing=True)
    tried = {
        "core_lsq": of_cores(inputs.model, {name: core_lsq.mixing(each) for name, each in moments.items()}),
        "mean_gate": of_cores(inputs.model, {name: mean_gate.mixing(each) for name, each in moments.items()}),
    }
    # Each candidate is measured against the same states: they are made once.
    teacher = Teacher(inputs.model, keeps=True)
    # A run of very few rows has none to spare for checking.
    checking = inputs.checking or inputs.calibration

    def distance(statics: dict[str, LowRank]) -> float:
        return mean_divergence(inputs.model, statics, checking, teacher)

    distances = {name: distance(statics) for name, statics in tried.items()}
    steps = affordable_steps(inputs)
    if steps >= MIN_STEPS:
        tried["distill"] = distill(inputs, tried[min(distances, key=distances.__getitem__)], steps)
        distances["distill"] = distance(tried["distill"])
    best = min(distances, key=distances.__getitem__)
    inputs.notes |= {"chosen": best, "tried": distances, "steps": steps if "distill" in tried else 0}
    return tried[best]


def affordable_steps(inputs: StrategyInputs) -> int:
    """Return the steps of distillation that a fifth of the training's cost leaves, once the rest is paid."""
    # Forward passes: over calibration rows the statistics', over checking rows the teacher's and three candidates'. A
    # step of distillation is the teacher's pass and the student's forward and backward.
    spent = inputs.forward * (rows_of(inputs.calibration) + 4 * rows_of(inputs.checking or inputs.calibration))
    return int((SHARE * inputs.trained_rows - spent) / ((1 + inputs.forward) * ROWS_A_STEP))


__all__ = ["SHARE", "affordable_steps", "auto"]
