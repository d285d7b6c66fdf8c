"""The table of strategies, by name: each makes one static update for every routed linear, all in `Setting`'s terms."""

from qd2mora.errors import InputRefused, nearest
from qd2mora.merging import core_lsq, mean_gate
from qd2mora.merging.setting import Setting, Strategy
from qd2mora.merging.static import of_cores
from qd2mora.mixture.low_rank import LowRank


def _mean_gate(setting: Setting) -> dict[str, LowRank]:
    return of_cores(setting.model, {name: mean_gate.mixing(each) for name, each in setting.moments().items()})


def _core_lsq(setting: Setting) -> dict[str, LowRank]:
    return of_cores(setting.model, {name: core_lsq.mixing(each) for name, each in setting.moments().items()})


STRATEGIES: dict[str, Strategy] = {"core_lsq": _core_lsq, "mean_gate": _mean_gate}


def find_strategy(name: str) -> Strategy:
    """Return a strategy of the table. Raises InputRefused naming the nearest one."""
    if name in STRATEGIES:
        return STRATEGIES[name]
    raise InputRefused(f"--strategy: unknown strategy '{name}'; {nearest(name, STRATEGIES)}")


__all__ = ["STRATEGIES", "find_strategy"]
