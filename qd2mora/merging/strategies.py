"""The table of strategies, by name: each makes one static update for every routed linear from the same inputs."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from qd2mora.errors import InputRefused, nearest
from qd2mora.merging import core_lsq, mean_gate
from qd2mora.merging.auto import SHARE, auto
from qd2mora.merging.distill import ROWS_A_STEP, distill
from qd2mora.merging.sequential import sequential
from qd2mora.merging.static_updates import of_cores
from qd2mora.merging.statistics import Moments
from qd2mora.merging.strategy_inputs import Strategy as Make
from qd2mora.merging.strategy_inputs import StrategyInputs
from qd2mora.mixture.low_rank import LowRank

DISTILL_STEPS = 300


@dataclass(frozen=True)
class Strategy:
    """One row: how static updates are made, in a line for people, and whether the rows must be of one task.

    `share`: of the training's cost that sampling may spend.
    """

    make: Make
    title: str
    one_task: bool = False
    share: float = 1.0


def _in_closed_form(mixing: Callable[[Moments], Tensor], *, with_mixing: bool = False) -> Make:
    def make(inputs: StrategyInputs) -> dict[str, LowRank]:
        moments = inputs.moments(with_mixing=with_mixing)
        return of_cores(inputs.model, {name: mixing(each) for name, each in moments.items()})

    return make


_core_lsq = _in_closed_form(core_lsq.mixing)


def _sequential(inputs: StrategyInputs) -> dict[str, LowRank]:
    return sequential(inputs.model, inputs.calibration)


def _distill(inputs: StrategyInputs) -> dict[str, LowRank]:
    # Never more rows than the training went over: a student should not cost more than what it imitates.
    steps = max(1, min(DISTILL_STEPS, inputs.trained_rows // ROWS_A_STEP))
    inputs.notes["steps"] = steps
    return distill(inputs, _core_lsq(inputs), steps)


STRATEGIES: dict[str, Strategy] = {
    "auto": Strategy(auto, "the best that a fifth of the training's cost buys", share=SHARE),
    "core_lsq": Strategy(_core_lsq, "least squares in rank space, closed form"),
    "distill": Strategy(_distill, f"up to {DISTILL_STEPS} steps towards the routed model's distributions"),
    "mean_gate": Strategy(_in_closed_form(mean_gate.mixing, with_mixing=True), "average gates"),
    "per_task": Strategy(_core_lsq, "least squares on one task's rows; goes with --task", one_task=True),
    "sequential": Strategy(_sequential, "least squares layer by layer"),
}


def find_strategy(name: str) -> Strategy:
    """Return a strategy of the table. Raises InputRefused naming the nearest one."""
    if name in STRATEGIES:
        return STRATEGIES[name]
    raise InputRefused(f"--strategy: unknown strategy '{name}'; {nearest(name, STRATEGIES)}")


__all__ = ["STRATEGIES", "Strategy", "find_strategy"]
