"""The default: the best quality for at most a fifth of what training cost, and a word on what was done.

Least squares and mean gates come from one pass over calibration rows and cost next to nothing; what is left of the
fifth goes into distillation from the better of them. Rows that nothing was fitted to decide. Cost is counted in rows,
forward and backward, never by the clock, so that the same run gives the same export on any machine.
"""

from qd2mora.merging import core_lsq, mean_gate
from qd2mora.merging.distill import ROWS_A_STEP, Teacher, distill, mean_divergence
from qd2mora.merging.setting import Setting, rows_of
from qd2mora.merging.static import of_cores
from qd2mora.mixture.low_rank import LowRank

SHARE = 0.2
MIN_STEPS = 10


def auto(setting: Setting) -> dict[str, LowRank]:
    """Return the static updates nearest to the routed model on checking rows."""
    moments = setting.moments(with_mixing=True)
    tried = {
        "core_lsq": of_cores(setting.model, {name: core_lsq.mixing(each) for name, each in moments.items()}),
        "mean_gate": of_cores(setting.model, {name: mean_gate.mixing(each) for name, each in moments.items()}),
    }
    teacher = Teacher(setting.model, keeps=True)
    checking = setting.checking or setting.calibration

    def distance(statics: dict[str, LowRank]) -> float:
        return mean_divergence(setting.model, statics, checking, teacher)

    distances = {name: distance(statics) for name, statics in tried.items()}
    steps = affordable_steps(setting)
    if steps >= MIN_STEPS:
        tried["distill"] = distill(setting, tried[min(distances, key=distances.__getitem__)], steps)
        distances["distill"] = distance(tried["distill"])
    best = min(distances, key=distances.__getitem__)
    setting.notes |= {"chosen": best, "tried": distances, "steps": steps if "distill" in tried else 0}
    return tried[best]


def affordable_steps(setting: Setting) -> int:
    """Return the steps of distillation that a fifth of the training's cost leaves, once the rest is paid."""
    spent = setting.forward * (rows_of(setting.calibration) + 4 * rows_of(setting.checking or setting.calibration))
    return int((SHARE * setting.trained_rows - spent) / ((1 + setting.forward) * ROWS_A_STEP))


__all__ = ["MIN_STEPS", "SHARE", "affordable_steps", "auto"]
