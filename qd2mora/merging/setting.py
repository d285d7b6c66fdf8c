"""What a strategy works with: the routed model, rows to fit and to check on, and what it may cost."""

from collections.abc import Callable
from dataclasses import dataclass, field

from peft import PeftModel
from torch import Tensor

from qd2mora.merging.statistics import Moments, collect
from qd2mora.mixture.low_rank import LowRank

Batches = list[dict[str, Tensor]]


@dataclass
class Setting:
    """One adapter to be made static.

    calibration, checking: batches of training rows, the latter kept for choosing and stopping. trained_rows: rows the
    training went forward and backward over, the unit of cost. notes: what a strategy wants said in the report.
    """

    model: PeftModel
    calibration: Batches
    checking: Batches
    trained_rows: int
    seed: int = 0
    notes: dict[str, object] = field(default_factory=dict)
    _moments: dict[str, Moments] = field(default_factory=dict)

    def moments(self) -> dict[str, Moments]:
        """Return the moments of every linear, from one pass over the calibration rows however often they are asked."""
        if not self._moments:
            self._moments = collect(self.model, self.calibration)
        return self._moments


Strategy = Callable[[Setting], dict[str, LowRank]]

__all__ = ["Batches", "Setting", "Strategy"]
