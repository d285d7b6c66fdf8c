"""Stopping by signal: the first asks, the second ends the process at once.

Where nothing is at stake (loading, tokenising, exporting: files appear whole or not at all) the first signal raises
SignalStop on the spot. Inside `deferred()` it is only noted, and the training loop stops where its state is whole.
Either way one line says at once that it came and how to go on: a library may be long in giving up.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from qd2mora.errors import SignalStop, StopError

SIGNALS = tuple(each for each in signal.Signals if each.name in ("SIGINT", "SIGTERM", "SIGUSR1"))
"""Windows has no SIGUSR1."""
AGAIN = "nothing was lost, run the command again"
AFTER_THE_STEP = "the step or evaluation ends and a checkpoint is saved, then --resume goes on from it"
BEFORE_A_STEP = "nothing is learned yet and nothing saved, --resume begins anew"


@dataclass
class StopRequest:
    """Which signal came, if any, and whether it is only noted."""

    number: int | None = None
    is_deferred: bool = False
    was_raised: bool = False
    """Whether SignalStop was raised on the spot."""
    then: str = AGAIN
    """How the work is gone on with."""
    then_deferred: str = AFTER_THE_STEP
    """The same, of a signal that is only noted."""

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note a signal while the block runs."""
        self.is_deferred = True
        self.check()
        try:
            yield
        finally:
            self.is_deferred = False

    @contextmanager
    def before_a_step(self) -> Iterator[None]:
        """Tell of a signal while the block runs that nothing is to be saved; the block looks for one itself."""
        self.then_deferred = BEFORE_A_STEP
        try:
            yield
        finally:
            self.then_deferred = AFTER_THE_STEP

    def check(self) -> None:
        """Raise SignalStop where a signal was noted, or was swallowed by a library."""
        if self.number is not None:
            raise SignalStop(f"stopped by {signal.Signals(self.number).name}; {self.then}")

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.number is not None:
            # The second one ends the process as if nobody listened, exit status and all.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.number = number
        _acknowledge(number, self.then_deferred if self.is_deferred else self.then)
        if not self.is_deferred:
            self.was_raised = True
            self.check()


def _acknowledge(number: int, then: str) -> None:
    """Say that a signal came; of several processes the first one speaks."""
    if sys.stderr is None or os.environ.get("RANK", "0") != "0":
        return
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # closed, or in the midst of being written to
        print(f"stopping at {signal.Signals(number).name}: {then}; a second signal ends at once", file=sys.stderr)


@contextmanager
def listening(then: str = AGAIN) -> Iterator[StopRequest]:
    """Handle SIGINT, SIGTERM and SIGUSR1 while the block runs; only the main thread of a program can.

    `then`: what a person is told of going on.
    """
    request = StopRequest(then=then)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.note) for number in SIGNALS}
    try:
        yield request
    except (StopError, RuntimeError, ValueError, OSError):
        # transformers 5.23 catches what is raised while it converts weights, and says that the weights are bad.
        if request.was_raised:
            request.check()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


__all__ = ["AFTER_THE_STEP", "AGAIN", "BEFORE_A_STEP", "SIGNALS", "StopRequest", "listening"]
