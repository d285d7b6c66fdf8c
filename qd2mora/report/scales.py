"""Axes: where a number stands, and the round numbers beside it."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Places numbers from `low` to `high` evenly between `start` and `stop`, their logarithms where `is_log`."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def place(self, number: float) -> float:
        """Return where a number stands; one scale of a single number puts it at the start."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, number = math.log10(low), math.log10(high), math.log10(number)
        span = (high - low) or 1.0
        return self.start + (self.stop - self.start) * (number - low) / span


def ticks(low: float, high: float, number: int = 4) -> list[float]:
    """Return round numbers that cover low to high."""
    if low == high == 0:
        low, high = 0.0, 1.0
    elif not high > low:
        low, high = low - abs(low) / 2, high + abs(high) / 2
    rough = (high - low) / number
    unit = 10.0 ** math.floor(math.log10(rough))
    # A little less than asked is as good: rounding must not turn a round step into the next one.
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return a few round numbers within low to high, which is a factor of 20 at least."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) <= 6:
            return found
    return found[:: -(-len(found) // 6)]


__all__ = ["Scale", "log_ticks", "ticks"]
