"""A task's score: a value for each row, their mean, and how sure it is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qd2mora.errors import NotFinite

Z = 1.96
RESAMPLES = 2000


@dataclass(frozen=True)
class Record:
    """One row's result. `value` is what the metric gives it, `loss` the nats of its right answer of `labels` tokens.

    `normalized`: the value where choices are weighed by nats a token, else None. `text`: what was written or chosen.
    `margin`: of two answers, how much better the model has the right one. Of judged answers `loss` is the objective's.
    """

    row: int
    value: float
    loss: float
    labels: int
    normalized: float | None = None
    text: str = ""
    tied: bool = False
    """Whether samples gave another answer as often as this one."""
    margin: float | None = None


@dataclass(frozen=True)
class Score:
    """One task's result over its rows, in their order; `metric` is one that `AskedTask` has."""

    metric: str
    records: tuple[Record, ...]

    @property
    def rows(self) -> int:
        return len(self.records)

    @property
    def values(self) -> list[float]:
        return [record.value for record in self.records]

    @property
    def is_share(self) -> bool:
        """Whether each row is right or wrong."""
        return self.metric in ("exact", "extract", "choice", "preferred", "rated")

    @property
    def mean(self) -> float:
        """The score: the share of right rows, the mean ROUGE-L, or the loss a token."""
        if self.metric == "loss":
            return self.loss
        return sum(self.values) / self.rows

    @property
    def tied(self) -> int:
        """Rows on which samples were tied."""
        return sum(record.tied for record in self.records)

    @property
    def correct(self) -> int:
        return round(sum(self.values))

    @property
    def loss(self) -> float:
        """Nats a token of the right answers."""
        return sum(record.loss for record in self.records) / sum(record.labels for record in self.records)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of `mean`: Wilson's for shares, else the bootstrap over rows."""
        if self.is_share:
            return wilson(self.correct, self.rows)
        if self.metric == "loss":
            return bootstrap([record.loss for record in self.records], [record.labels for record in self.records])
        return bootstrap(self.values)

    @property
    def accuracy_normalized(self) -> float | None:
        """The share of right rows where choices are weighed by nats a token; None where none are weighed."""
        normalized = [record.normalized for record in self.records if record.normalized is not None]
        if not normalized:
            return None
        return sum(normalized) / self.rows

    @property
    def margin(self) -> float | None:
        """The mean margin of the right answers; None where none are compared."""
        margins = [record.margin for record in self.records if record.margin is not None]
        if not margins:
            return None
        return sum(margins) / len(margins)

    def to_json(self) -> dict[str, object]:
        """Return the numbers without the rows."""
        content: dict[str, object] = {"metric": self.metric, "rows": self.rows, "loss": self.loss}
        content |= {"score": self.mean, "interval": self.interval}
        if self.is_share:
            content |= {"correct": self.correct, "accuracy": self.mean}
        if self.accuracy_normalized is not None:
            content["accuracy_normalized"] = self.accuracy_normalized
        if self.margin is not None:
            content["margin"] = self.margin
        if self.metric == "extract":
            content["without_answer"] = sum(not record.text for record in self.records)
        if self.tied:
            content["tied"] = self.tied
        return content


def refuse_not_finite(task: str, records: Sequence[Record]) -> None:
    """Raise NotFinite, naming the first row whose loss or value is not a number."""
    for record in records:
        if not (math.isfinite(record.loss) and math.isfinite(record.value)):
            raise NotFinite(f"task {task}, row {record.row + 1}: the loss of its answer is {record.loss}")


def wilson(correct: int, rows: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    # Wilson (1927): unlike p +- z sqrt(p (1 - p) / n) it stays within 0 and 1, and is no point at 0 of n.
    p = correct / rows
    center = (p + Z * Z / (2 * rows)) / (1 + Z * Z / rows)
    half = Z * math.sqrt(p * (1 - p) / rows + Z * Z / (4 * rows * rows)) / (1 + Z * Z / rows)
    return max(0.0, center - half), min(1.0, center + half)


def bootstrap(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile interval of sum(values) / sum(weights), rows drawn anew with replacement; weights 1 if None.

    A function of its arguments alone.
    """
    numbers, rows = np.asarray(values, dtype=np.float64), len(values)
    shares = np.ones(rows) if weights is None else np.asarray(weights, dtype=np.float64)
    # Rows are drawn, not tokens: the tokens of one answer are no independent samples.
    drawn = np.random.default_rng(seed).integers(0, rows, (RESAMPLES, rows))
    low, high = np.quantile(numbers[drawn].sum(1) / shares[drawn].sum(1), [0.025, 0.975])
    return float(low), float(high)


__all__ = ["Record", "Score", "bootstrap", "refuse_not_finite", "wilson"]
