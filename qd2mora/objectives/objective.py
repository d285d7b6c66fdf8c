"""What an objective is: a loss for each row, from what models say of its lines, and numbers to read beside it.

A row has one line (a prompt and its answer) or two, which run through the model together (the better answer, then the
worse). An objective is a file with a class, and a row in the table of `objectives`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qd2mora.data import Row


@dataclass(frozen=True)
class Said:
    """What models say of a micro batch's lines.

    `of_lines` (lines,) float32: the summed cross-entropy of each line's answer in nats, which is minus the answer's
    log-probability; where the objective has a head, the line's score. `reference`: the same of the frozen model.
    `baseline`: what the objective takes of the whole step (see `Objective.has_baseline`). `divergence` (lines,):
    how far each line's tokens are from the frozen model, summed (see `Objective.has_divergence`).
    """

    of_lines: Tensor
    lines: Sequence[Row]
    reference: Tensor | None = None
    baseline: float = 0.0
    divergence: Tensor | None = None

    @property
    def num_tokens(self) -> Tensor:
        """Learned tokens of each line, (lines,) float32."""
        return self._tensor([float(line.num_labels) for line in self.lines])

    @property
    def worths(self) -> Tensor:
        """What the data says of each line's answer, (lines,) float32; 0 where it says nothing."""
        return self._tensor([line.pair.worth or 0.0 for line in self.lines])

    @property
    def log_ratios(self) -> Tensor:
        """Return log p(answer) less that of the reference, (lines,) float32."""
        assert self.reference is not None
        return self.reference - self.of_lines

    @property
    def mean_log_probs(self) -> Tensor:
        """Return log p(answer) a token, (lines,) float32."""
        return -self.of_lines / self.num_tokens

    def _tensor(self, numbers: list[float]) -> Tensor:
        return torch.tensor(numbers, device=self.of_lines.device)


class Objective(Protocol):
    """What is learned of rows."""

    @property
    def lines(self) -> int:
        """Lines of a row."""

    @property
    def names(self) -> tuple[str, ...]:
        """What `measures` returns, in its order."""

    @property
    def has_head(self) -> bool:
        """Whether lines are scored by a head of its own, and not by their likelihood."""

    @property
    def has_reference(self) -> bool:
        """Whether a frozen model says something too."""

    @property
    def has_baseline(self) -> bool:
        """Whether it takes the mean log-ratio of answers to other rows' prompts, over the whole step."""

    @property
    def has_divergence(self) -> bool:
        """Whether it counts how far each token is from a frozen model."""

    def count(self, row: Row) -> int:
        """Return what a row counts in the loss of a step, which is a mean over what all its rows count."""

    def losses(self, said: Said) -> Tensor:
        """Return the loss of each row, (rows,) float32, to be summed and divided by what the rows count."""

    def rewards(self, said: Said) -> Tensor:
        """Return how good each line's answer is by the model, (lines,) float32."""

    def measures(self, said: Said) -> Tensor:
        """Return for each name a sum over the rows and what it is divided by, (names, 2) float32, no gradient."""


def divergence(losses: Tensor, of_reference: Tensor) -> Tensor:
    """Return exp(d) - d - 1 of each token, d = log ref - log p: at least 0, its mean over p is KL(p || ref).

    The third estimator of Schulman 2020 (joschu.net/blog/kl-approx.html), as in DeepSeekMath's equation 4; losses are
    minus log-probabilities.
    """
    apart = losses - of_reference
    return apart.exp() - apart - 1


def told(names: Sequence[str], sums: Sequence[float]) -> dict[str, float]:
    """Return what sums of `measures`, one after another, come to; a name that nothing was counted of is left out."""
    pairs = zip(names, sums[::2], sums[1::2], strict=True)
    return {name: total / number for name, total, number in pairs if number}


Measures = Mapping[str, float]
"""Numbers of an objective by name."""

__all__ = ["Measures", "Objective", "Said", "divergence", "told"]
