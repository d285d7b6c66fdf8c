"""What a run says about itself: `metrics.jsonl`, trackers, the screen. None of it can stop a training.

On a terminal a person sees one live line, elsewhere plain lines.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from qd2mora.disk.durable import write_atomically
from qd2mora.objectives import Measures
from qd2mora.terminal import Screen
from qd2mora.terminal.pace import EVERY_S, Pace
from qd2mora.training.held_out import Evaluation

GIB = 1 << 30
SHOWN = ("accuracy", "margin", "reward")
"""What of an objective's measures the screen shows; all of them are written."""
WIDE = 110
"""Columns of a terminal from which on the line has room for a bar and the penalty."""


class StepDisplay:
    """Shows step, loss, penalty, learning rate, tokens/s, memory and time left."""

    def __init__(
        self, total: int, start: int, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or Screen()
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

    def evaluation(
        self, step: int, losses: Mapping[str, float], measures: Mapping[str, Measures], scores: Mapping[str, float]
    ) -> None:
        """Show held-out losses per task, what is measured beside them, and the scores there are."""
        names = [name for name in SHOWN if any(name in numbers for numbers in measures.values())]
        measured = [(name, {task: each[name] for task, each in measures.items() if name in each}) for name in names]
        for what, numbers in (("loss", losses), *measured, ("score", scores)):
            if numbers:
                each = "  ".join(f"{task} {number:.4f}" for task, number in numbers.items())
                mean = f"mean {sum(numbers.values()) / len(numbers):.4f}  " if len(numbers) > 1 else ""
                self.say(f"step {step}/{self.total}  held-out {what}  {mean}{each}")

    def doing(self, line: str) -> None:
        """Show what goes on between steps: in the live line, elsewhere in a line of its own."""
        if self.console.is_terminal:
            self.live.update(self.row, numbers=line)
        else:
            self.say(line)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)
        sys.stdout.flush()


@dataclass
class Journal:
    """Writes lines of numbers from the main process; the first failure is told, the rest are counted."""

    path: Path
    accelerator: Accelerator
    display: StepDisplay
    num_lost: int = 0

    def step(self, step: int, metrics: dict[str, float], is_logged: bool) -> None:
        """Show a step; write it where it is one of those that are logged."""
        if not self.accelerator.is_main_process:
            return
        # Each by itself: a full disk must not silence the screen, nor a closed pipe the file.
        self._try(lambda: self.display.step(step, metrics))
        if is_logged:
            self._try(lambda: self._append({"step": step, **_finite(metrics)}))
            self._try(lambda: self.accelerator.log(metrics, step=step))

    def evaluation(self, step: int, found: Evaluation) -> None:
        """Write held-out losses, scores of tasks that name a metric, what routers did, and what is wrong with that."""
        if not (found.losses or found.routing) or not self.accelerator.is_main_process:
            return
        scores = {task: score.mean for task, score in found.scores.items()}
        routing = dict(found.routing or {})
        measures = {task: _finite(numbers) for task, numbers in found.measures.items()}
        said = {"eval_loss": _finite(found.losses), "eval_measures": measures, "eval_score": _finite(scores)}
        said["routing"] = routing
        line: dict[str, object] = {"step": step} | {key: numbers for key, numbers in said.items() if numbers}
        if found.alarm:
            line["alarm"] = found.alarm
        self._try(lambda: self._append(line))
        named = {f"eval_loss/{task}": loss for task, loss in found.losses.items()}
        named |= {
            f"eval_{name}/{task}": number
            for task, numbers in found.measures.items()
            for name, number in numbers.items()
        }
        named |= {f"eval_score/{task}": score for task, score in scores.items()}
        named |= {f"routing/{name}": number for name, number in routing.items() if number is not None}
        self._try(lambda: self.accelerator.log(named, step=step))
        if found.losses:
            self._try(lambda: self.display.evaluation(step, found.losses, found.measures, scores))

    def pace(self, what: str, total: float) -> Pace:
        """Return what tells of work between steps: where a line is live, each second."""

        def tell(line: str) -> None:
            if self.accelerator.is_main_process:
                self._try(lambda: self.display.doing(line))

        return Pace(what, total, tell, every_s=1.0 if self.display.console.is_terminal else EVERY_S)

    def say(self, line: str) -> None:
        """Show a line."""
        if self.accelerator.is_main_process:
            self._try(lambda: self.display.say(line))

    def _append(self, line: dict[str, object]) -> None:
        # Not forced to disk: a line of a log is worth no wait, and a resume drops what lies after its checkpoint.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except (OSError, ValueError, RuntimeError) as error:  # the last two are what trackers raise
            self.num_lost += 1
            if self.num_lost == 1:
                with contextlib.suppress(OSError, ValueError):
                    self.display.say(f"logging fails and training goes on: {error}")


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps that will be done again, and a last line cut short by a kill."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    write_atomically(path, "".join(line + "\n" for line in kept))


def _clock_time(seconds: float) -> str:
    """Return 1:02:03, or 02:03 below an hour, and days where there are some."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute:02}:{second:02}"


def _finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN; null says as much."""
    return {key: value if math.isfinite(value) else None for key, value in numbers.items()}


__all__ = ["Journal", "StepDisplay", "forget_after"]
