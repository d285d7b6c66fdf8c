"""What a person sees while a run goes on: one live line on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

GIB = 1 << 30
WIDE = 110
"""Columns of a terminal from which on the line has room for a bar and the penalty."""


class StepDisplay:
    """Shows step, loss, penalty, learning rate, tokens/s, memory and time left."""

    def __init__(
        self, total: int, start: int, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or Console(stderr=False)
        self.total, self.start, self.clock = total, start, clock
        self.began = clock()
        self.every = max(1, total // 20)
        self.live = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            *([BarColumn()] if self.console.width >= WIDE else []),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.row = self.live.add_task("train", total=total, completed=start, numbers="")

    def __enter__(self) -> Self:
        self.began = self.clock()
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Show one step's numbers; `step` counts from 1."""
        has_room = not self.console.is_terminal or self.console.width >= WIDE
        numbers = [f"loss {metrics['loss']:.4f}"]
        numbers += [f"penalty {metrics['penalty']:.2e}"] if metrics["penalty"] and has_room else []
        numbers += [
            f"lr {metrics['learning_rate']:.1e}".replace("e-0", "e-"),
            f"{metrics['tokens_per_s']:,.0f} tokens/s",
            f"{metrics['memory'] / GIB:.2f} GiB",
            f"{self.left(step)} left" if step < self.total else f"{_clock_time(self.clock() - self.began)} in all",
        ]
        self.live.update(self.row, completed=step, numbers="  ".join(numbers))
        if not self.console.is_terminal and (step % self.every == 0 or step == 1):
            self.say(f"step {step}/{self.total}  {'  '.join(numbers)}")

    def left(self, step: int) -> str:
        """Return the time that is left, at the pace since this process began: evaluations and saves count."""
        done = step - self.start
        return _clock_time((self.clock() - self.began) / done * (self.total - step)) if done > 0 else "?"

    def evaluation(self, step: int, losses: dict[str, float], scores: Mapping[str, float]) -> None:
        """Show held-out losses per task, and the scores there are."""
        for what, numbers in (("loss", losses), ("score", scores)):
            if numbers:
                each = "  ".join(f"{task} {number:.4f}" for task, number in numbers.items())
                mean = f"mean {sum(numbers.values()) / len(numbers):.4f}  " if len(numbers) > 1 else ""
                self.say(f"step {step}/{self.total}  held-out {what}  {mean}{each}")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)
        sys.stdout.flush()


def _clock_time(seconds: float) -> str:
    """Return 1:02:03, or 02:03 below an hour, and days where there are some."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute:02}:{second:02}"


__all__ = ["StepDisplay"]
