"""Stopping before the wall: a step and a save must still fit into the time that is left."""

import time

from qd2mora.recipe import Train

_UNITS = {"s": 1, "min": 60, "h": 3600}
SPARE_S = 5.0


class TimeLimit:
    """Knows how long a step takes at worst, and when the next would be one too many."""

    def __init__(self, train: Train, began: float | None = None) -> None:
        self.began = time.monotonic() if began is None else began
        self.longest_s = 0.0
        self.limit_s = _seconds(train.time_limit) if train.time_limit else float("inf")

    def took(self, seconds: float) -> None:
        """Note how long a step, with what was saved and evaluated after it, has taken."""
        self.longest_s = max(self.longest_s, seconds)

    @property
    def is_near(self) -> bool:
        """Whether there is no time for two more such steps: one to do, one's worth for saving."""
        spare = min(SPARE_S, self.limit_s / 10)
        return time.monotonic() - self.began + 2 * self.longest_s + spare >= self.limit_s


def _seconds(text: str) -> float:
    unit = text.lstrip("0123456789. ")
    return float(text.removesuffix(unit)) * _UNITS[unit]


__all__ = ["TimeLimit"]
