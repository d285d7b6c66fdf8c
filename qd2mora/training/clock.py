"""The clock of a run: a step that hangs ends it, and a wall that is near stops it.

Each finished micro batch is a sign of life, of training or of held-out rows; on a CPU so is processor time that grows.
Where none comes for ten times the median micro batch of training, and two minutes at least, the device or a process is
lost: the stacks of all threads are written to stderr and the process exits with code 3; the last checkpoint stands.
Under a time limit, a step and a save must still fit into the time that is left.
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

from qd2mora.recipe import Train
from qd2mora.recipe.train import seconds_of

LEAST_S = 120.0
TIMES_MEDIAN = 10
ENOUGH_INTERVALS = 5
BUSY = 0.1
"""Processor time for each second of a process that works: what waits, and what redraws a line meanwhile, use less."""
SPARE_S = 5.0
"""Left of a time limit at the end."""


class Watchdog:
    """Counts the time since the last sign of life; watches from the moment it knows how long things take."""

    def __init__(
        self,
        least_s: float | None = None,
        give_up: Callable[[float], None] | None = None,
        *,
        is_on_cpu: bool = False,
        last_saved: Callable[[], int] = lambda: 0,
    ) -> None:
        """`is_on_cpu`: processor time is work, where a driver for a GPU waits in a loop.

        `last_saved` tells the step that a resume would go on from.
        """
        if least_s is None:
            least_s = LEAST_S
        self.least_s, self.is_on_cpu, self.last_saved = least_s, is_on_cpu, last_saved
        self.give_up = give_up or self._end_process
        self._intervals: deque[float] = deque(maxlen=64)
        self._began = self._last = time.monotonic()
        self._is_paused = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self.alive()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def beat(self) -> None:
        """Give the sign of life of a micro batch of training, by whose median silence is judged."""
        self._intervals.append(time.monotonic() - self._began)
        self.alive()

    def alive(self) -> None:
        """Give a sign of life of another kind, which says nothing of how long a micro batch of training takes."""
        self._began = self._last = time.monotonic()

    def goes_on(self) -> bool:
        """Give a sign of life of another kind; what gives it may go on."""
        self.alive()
        return True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch while the block does what may take long: a slow disk, scores, other processes that do these.

        A process that is lost meanwhile is noticed by those that wait for it, after `processes.PATIENCE`.
        """
        self._is_paused = True
        try:
            yield
        finally:
            self.alive()
            self._is_paused = False

    @property
    def limit_s(self) -> float:
        """Seconds without a sign of life that are too many; infinite until intervals are known."""
        if len(self._intervals) < ENOUGH_INTERVALS:
            return float("inf")
        # A median, because a first pass that compiles or warms up says nothing of the rest; a copy, because the loop
        # appends meanwhile.
        return max(self.least_s, TIMES_MEDIAN * statistics.median(list(self._intervals)))

    def _watch(self) -> None:
        tick = min(1.0, self.least_s / 4)
        before, used_before = time.monotonic(), time.process_time()
        while not self._ended.wait(tick):
            now, used = time.monotonic(), time.process_time()
            if now - before > tick + self.least_s / 2:
                # This thread was not run either: the process was stopped as a whole (Ctrl-Z), nothing hangs.
                self._last += now - before
            if self.is_on_cpu and used - used_before >= BUSY * (now - before):
                self._last = now
            before, used_before = now, used
            silent = now - self._last
            if not self._is_paused and silent > self.limit_s:
                self.give_up(silent)
                return

    def _end_process(self, silent: float) -> None:
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        step = self.last_saved()
        kept = f"--resume goes on after step {step}, the last that was saved"
        if not step:
            kept = "no checkpoint was due yet, --resume begins anew; a smaller train.save_every loses less"
        print(
            f"error: no sign of life for {silent:.0f} s: the device or another process is lost; {kept}",
            file=sys.stderr,
            flush=True,
        )
        # No exception would do: the main thread stands in a call of the driver or of a collective, and never comes
        # back.
        os._exit(3)


class TimeLimit:
    """Knows how long a step takes at worst, and when the next would be one too many."""

    def __init__(self, train: Train) -> None:
        self.began = time.monotonic()
        self.longest_s = 0.0
        self.limit_s = seconds_of(train.time_limit)

    def took(self, seconds: float) -> None:
        """Note how long a step, with what was saved and evaluated after it, has taken."""
        self.longest_s = max(self.longest_s, seconds)

    @property
    def is_near(self) -> bool:
        """Whether there is no time for two more such steps: one to do, one's worth for saving."""
        # Of a limit of a few seconds, as tests set it, the whole reserve would leave nothing.
        spare = min(SPARE_S, self.limit_s / 10)
        return time.monotonic() - self.began + 2 * self.longest_s + spare >= self.limit_s


__all__ = ["TimeLimit", "Watchdog"]
