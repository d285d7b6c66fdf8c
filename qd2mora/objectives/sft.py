"""Imitation: the cross-entropy of the learned tokens, a mean over those of the whole step."""

from torch import Tensor

from qd2mora.data import Row
from qd2mora.objectives.objective import Said


class Sft:
    """Learns answers."""

    lines = 1
    names = ()
    has_head = has_reference = has_baseline = has_divergence = False

    def count(self, row: Row) -> int:
        """Return the row's learned tokens: a mean of rows' means would weigh short answers up."""
        return row.num_labels

    def losses(self, said: Said) -> Tensor:
        """Return each row's summed cross-entropy."""
        return said.of_lines

    def rewards(self, said: Said) -> Tensor:
        """Return each answer's log-probability."""
        return -said.of_lines

    def measures(self, said: Said) -> Tensor:
        """Return nothing: the loss says it all."""
        return said.of_lines.new_zeros(0, 2)


__all__ = ["Sft"]
