"""What a person sees while a run goes on: a live bar on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

GIB = 1 << 30


class StepDisplay:
    """Shows step, loss, penalty, tokens/s, memory and time left."""

    def __init__(self, total: int, start: int, console: Console | None = None) -> None:
        self.console = console or Console(stderr=False)
        self.total = total
        self.every = max(1, total // 20)
        self.live = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.row = self.live.add_task("train", total=total, completed=start, numbers="")

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Show one step's numbers; `step` counts from 1."""
        numbers = (
            f"loss {metrics['loss']:.4f}  penalty {metrics['penalty']:.2e}  "
            f"{metrics['tokens_per_s']:,.0f} tokens/s  {metrics['memory'] / GIB:.2f} GiB"
        )
        self.live.update(self.row, completed=step, numbers=numbers)
        if not self.console.is_terminal and (step % self.every == 0 or step == 1):
            self.say(f"step {step}/{self.total}  {numbers}")

    def evaluation(self, step: int, losses: dict[str, float], scores: Mapping[str, float]) -> None:
        """Show held-out losses per task, and the scores there are."""
        for what, numbers in (("loss", losses), ("score", scores)):
            if numbers:
                each = "  ".join(f"{task} {number:.4f}" for task, number in numbers.items())
                self.say(f"step {step}/{self.total}  held-out {what}  {each}")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(line, highlight=False, soft_wrap=True)
        sys.stdout.flush()


__all__ = ["StepDisplay"]
