"""A watch on the loop: a step that hangs, on a lost device or a lost process, ends the run instead of waiting for ever.

Each finished micro batch is a sign of life. Where none comes for ten times the median interval, and two minutes at
least, the stacks of all threads are written to stderr and the process exits with code 3; the last checkpoint stands.
"""

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

LEAST_S = 120.0
TIMES_MEDIAN = 10
ENOUGH_INTERVALS = 5


class Watchdog:
    """Counts the time since the last sign of life; watches from the moment it knows how long things take."""

    def __init__(self, least_s: float | None = None, give_up: Callable[[float], None] | None = None) -> None:
        self.least_s = LEAST_S if least_s is None else least_s
        self.give_up = give_up or _give_up
        self._intervals: deque[float] = deque(maxlen=64)
        self._last = time.monotonic()
        self._is_paused = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def beat(self) -> None:
        """Give a sign of life."""
        now = time.monotonic()
        self._intervals.append(now - self._last)
        self._last = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch while the block does what may take long: a slow disk, scores, other processes that do these.

        A process that is lost meanwhile is noticed by those that wait for it, after `processes.PATIENCE`.
        """
        self._is_paused = True
        try:
            yield
        finally:
            self._last = time.monotonic()
            self._is_paused = False

    @property
    def limit_s(self) -> float:
        """Seconds without a sign of life that are too many; infinite until intervals are known."""
        if len(self._intervals) < ENOUGH_INTERVALS:
            return float("inf")
        return max(self.least_s, TIMES_MEDIAN * statistics.median(list(self._intervals)))

    def _watch(self) -> None:
        tick = min(1.0, self.least_s / 4)
        before = time.monotonic()
        while not self._ended.wait(tick):
            now = time.monotonic()
            if now - before > tick + self.least_s / 2:
                # This thread was not run either: the process was stopped as a whole (Ctrl-Z), nothing hangs.
                self._last += now - before
            before = now
            silent = now - self._last
            if not self._is_paused and silent > self.limit_s:
                self.give_up(silent)
                return


def _give_up(silent: float) -> None:
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    print(
        f"error: no sign of life for {silent:.0f} s: the device or another process is lost; continue with --resume",
        file=sys.stderr,
        flush=True,
    )
    os._exit(3)


__all__ = ["Watchdog"]
