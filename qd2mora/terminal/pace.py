"""How far long work is and how long it will still take, on standard error: a bar on a terminal, else a line at times.

Work of a few seconds says nothing. Of several processes the first one speaks.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qd2mora.terminal.streams import Screen

FIRST_S, EVERY_S = 10.0, 30.0
"""Seconds before the first line, and between two."""
T = TypeVar("T")
Tell = Callable[[str], object]


class Pace:
    """Counts work that is done, in units of about one length, and tells how far it is."""

    def __init__(
        self, what: str, total: float, tell: Tell, *, every_s: float = EVERY_S, clock: Callable[[], float] | None = None
    ) -> None:
        """`every_s`: between two lines; the first comes after FIRST_S, or sooner where lines may."""
        self.what, self.total, self.tell, self.every_s = what, total, tell, every_s
        self.clock = clock or time.monotonic
        self.done, self.known = 0.0, 0.0
        self.began = self.clock()
        self._next = self.began + min(FIRST_S, every_s)

    def advance(self, number: float = 1, *, is_known: bool = False) -> None:
        """Count work; `is_known`: it was done by an earlier start, and says nothing of the pace."""
        self.done += number
        if is_known:
            self.known += number
        now = self.clock()
        if now >= self._next and self.done < self.total:
            self._next = now + self.every_s
            self.tell(self.line())

    def line(self) -> str:
        """Say how far the work is and what is left."""
        return f"{self.what}: {self.done:,.0f} of {self.total:,.0f}{self.left()}"

    def left(self) -> str:
        """Return the time that is left, as the end of a line; nothing where no pace is known yet."""
        measured = self.done - self.known
        if measured <= 0:
            return ""
        return f", about {in_words((self.clock() - self.began) / measured * (self.total - self.done))} left"


@contextmanager
def showing(what: str, total: float, *, is_shown: bool = True) -> Iterator[Callable[[float], object]]:
    """Show work on standard error while the block runs; call what is yielded with the units that were done."""
    if not is_shown or sys.stderr is None or os.environ.get("RANK", "0") != "0":
        yield lambda number: None
        return
    console = Screen(stderr=True)
    if not console.is_terminal:
        yield Pace(what, total, tell_plainly).advance
        return
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(what, total=total)
        yield lambda number: progress.advance(bar, number)


def paced(what: str, work: Sequence[T], *, is_shown: bool = True) -> Iterator[T]:
    """Yield each piece of work, and show how many are done."""
    with showing(what, len(work), is_shown=is_shown) as done:
        for each in work:
            yield each
            done(1)


def tell_plainly(line: str) -> None:
    """Print a line on standard error, where nothing is a terminal's."""
    print(line, file=sys.stderr, flush=True)


def in_words(seconds: float) -> str:
    """Return a time as people say it: 40 s, 3 min, 2.1 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


__all__ = ["EVERY_S", "FIRST_S", "Pace", "Tell", "in_words", "paced", "showing", "tell_plainly"]
