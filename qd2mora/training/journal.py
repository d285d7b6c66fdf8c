"""What a run says about itself: `metrics.jsonl`, trackers, the screen. None of it can stop a training."""

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from qd2mora.disk.durable import write_atomically
from qd2mora.training.progress import StepDisplay


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
        self._try(lambda: self.display.step(step, metrics))
        if is_logged:
            self._try(lambda: self._append({"step": step, **_finite(metrics)}))
            self._try(lambda: self.accelerator.log(metrics, step=step))

    def evaluation(
        self,
        step: int,
        losses: dict[str, float],
        scores: Mapping[str, float],
        routing: Mapping[str, float | None] | None = None,
        alarm: str | None = None,
    ) -> None:
        """Write held-out losses, scores of tasks that name a metric, what routers did, and what is wrong with that."""
        if not (losses or routing) or not self.accelerator.is_main_process:
            return
        line: dict[str, Any] = {"step": step}
        line |= {"eval_loss": _finite(losses)} if losses else {}
        line |= {"eval_score": _finite(scores)} if scores else {}
        line |= {"routing": dict(routing)} if routing else {}
        line |= {"alarm": alarm} if alarm else {}
        self._try(lambda: self._append(line))
        named = {f"eval_loss/{task}": loss for task, loss in losses.items()}
        named |= {f"eval_score/{task}": score for task, score in scores.items()}
        named |= {f"routing/{name}": number for name, number in (routing or {}).items() if number is not None}
        self._try(lambda: self.accelerator.log(named, step=step))
        if losses:
            self._try(lambda: self.display.evaluation(step, losses, scores))

    def say(self, line: str) -> None:
        """Show a line."""
        if self.accelerator.is_main_process:
            self._try(lambda: self.display.say(line))

    def _append(self, line: dict[str, Any]) -> None:
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


def _finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN; null says as much."""
    return {key: value if math.isfinite(value) else None for key, value in numbers.items()}


__all__ = ["Journal", "forget_after"]
