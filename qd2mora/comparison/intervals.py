"""Differences between arms, and how sure they are: the bootstrap over seeds and rows, paired.

Two arms answer the same test rows and learn the same rows in the same order, so that a row's difference within a seed
is free of what rows and seeds have in common. Seeds are drawn anew first, then the rows of each task; the mean over
tasks counts every task alike. With few seeds the interval is rough, and says so by being wide.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Values = Mapping[str, NDArray[np.float64]]
"""Of each task: (seeds, rows)."""

RESAMPLES = 2000


def macro(values: Values) -> float:
    """Return the mean over tasks of the mean over seeds and rows."""
    return float(np.mean([each.mean() for each in values.values()]))


def interval(values: Values) -> tuple[float, float]:
    """Return the 95% percentile interval of `macro`."""
    generator = np.random.default_rng(0)
    means = np.empty(RESAMPLES)
    num_seeds = len(next(iter(values.values())))
    for draw in range(RESAMPLES):
        # The same seeds for every task: a seed is one training, whose luck all tasks share.
        seeds = generator.integers(0, num_seeds, num_seeds)
        means[draw] = np.mean(
            [each[seeds][:, generator.integers(0, each.shape[1], each.shape[1])].mean() for each in values.values()]
        )
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def difference(one: Values, two: Values) -> dict[str, NDArray[np.float64]]:
    """Return one minus two, row by row within each seed and task."""
    return {task: one[task] - two[task] for task in one}


__all__ = ["Values", "difference", "interval", "macro"]
