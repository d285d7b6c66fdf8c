"""What a strategy works with: the routed model, rows to fit and to check on, and what it may cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from peft import PeftModel
from torch import Tensor

from qd2mora.memory.checkpointing import decoder_layers
from qd2mora.merging.statistics import Moments, balanced, collect
from qd2mora.mixture.low_rank import LowRank

Batches = Sequence[dict[str, Tensor]]


@dataclass
class StrategyInputs:
    """One adapter to be made static, from training rows alone.

    calibration: batches that statistics come from. checking: others, for choosing between results. training: all but
    those that check, in random order, for strategies that learn. trained_rows: rows the training went forward and
    backward over, the unit of cost. recomputed: decoder layers whose activations training recomputed, which a student
    then does too. eight_bit: whether its optimiser kept 8-bit moments. notes: what the report should say of the work.
    """

    model: PeftModel
    calibration: Batches
    checking: Batches
    training: Batches
    trained_rows: int
    recomputed: int = 0
    eight_bit: bool = False
    notes: dict[str, object] = field(default_factory=dict)
    _moments: dict[str, Moments] = field(default_factory=dict)
    _has_mixing: bool = False

    @property
    def forward(self) -> float:
        """Cost of a row's forward pass, where the training's forward and backward over a frozen base are 1.

        The base has no gradients of weights, so backward costs what forward does, and of a recomputed layer twice that.
        """
        return 1 / (2 + self.recomputed / len(decoder_layers(self.model.get_base_model())))

    def moments(self, *, with_mixing: bool = False) -> dict[str, Moments]:
        """Return the moments of every linear, from one pass over the calibration rows however often they are asked.

        `with_mixing`: the average K_t too, which takes longer; asked for first, it serves all that ask later.
        """
        if not self._moments or (with_mixing and not self._has_mixing):
            self._moments = collect(self.model, self.calibration, with_mixing=with_mixing, weigh=balanced)
            self._has_mixing = with_mixing
        return self._moments


Strategy = Callable[[StrategyInputs], dict[str, LowRank]]


def rows_of(batches: Batches) -> int:
    """Return how many rows batches hold, the last one read to see."""
    return 0 if not batches else (len(batches) - 1) * len(batches[0]["labels"]) + len(batches[-1]["labels"])


__all__ = ["Batches", "Strategy", "StrategyInputs", "rows_of"]
