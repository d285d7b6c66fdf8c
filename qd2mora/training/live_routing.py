"""Routing while a run goes on: measured on the rows of each evaluation, told where it collapses, kept for the end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from qd2mora.data import Row, TaskRows
from qd2mora.inspection import RoutingReport, RoutingWatch, collapse_line, routing_report, summary
from qd2mora.inspection.finished_run import TRAINING_ROWS, rows_seen, rows_to_watch
from qd2mora.inspection.routing_summary import measured


class LiveRouting:
    """Watches the routers of a run whenever it is evaluated; where a method has none, does nothing."""

    def __init__(self, model: PeftModel, tasks: list[TaskRows]) -> None:
        self.model, self.tasks = model, tasks
        self.watch = RoutingWatch(model, len(tasks))
        self.step: int | None = None
        self._num_told = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count anew, while the block lasts."""
        self.watch.start()
        with self.watch.watching():
            yield

    def stand_ins(self, task: TaskRows) -> list[Row]:
        """Return training rows to watch of a task that holds none out; none where nothing is watched."""
        return [] if task.validation or not self.watch.routers else rows_to_watch(task, TRAINING_ROWS)

    def take(
        self, step: int, add_up: Callable[[Tensor], Tensor], device: torch.device
    ) -> tuple[dict[str, Any] | None, str | None]:
        """Return the numbers of what was counted, and one line where routers have collapsed.

        Every process calls this, as `add_up` sums over all of them.
        """
        self.watch.reduce(add_up, device)
        found = measured(self.watch)
        if not found:
            return None, None
        self.step = step
        return summary(found, self.model), collapse_line(found)

    def is_news(self, numbers: dict[str, Any]) -> bool:
        """Tell whether a collapse has not been told yet, or has doubled since."""
        is_new = numbers["collapsed"] >= max(1, 2 * self._num_told)
        self._num_told = numbers["collapsed"] if is_new else self._num_told
        return is_new

    def report(self) -> RoutingReport:
        """Return the report of the last evaluation."""
        names = [task.task.name for task in self.tasks]
        chosen = [task.validation or self.stand_ins(task) for task in self.tasks]
        return routing_report(self.watch, self.model, names, rows_seen(self.tasks, chosen), self.step)


__all__ = ["LiveRouting"]
