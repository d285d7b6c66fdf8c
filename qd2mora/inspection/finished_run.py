"""Looking at a run that is over: one pass over held-out rows, or training rows of a task that holds none out."""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel

from qd2mora.base.passes import device_of
from qd2mora.data import Row, TaskRows, collate, prepare
from qd2mora.inspection.counting import RoutingWatch
from qd2mora.inspection.routing_report import RoutingReport, write_routing
from qd2mora.inspection.routing_summary import routing_report
from qd2mora.memory.loss import labelled_states
from qd2mora.run_folder import RunFolder, is_run, open_run

ROWS_OF_A_TASK = 256
TRAINING_ROWS = 32
"""Training rows that stand in for a task without held-out rows while it trains."""
ROWS_AT_ONCE = 8


def inspect_run(run: str | Path, *, rows: int = ROWS_OF_A_TASK, allow_changed: Collection[str] = ()) -> RoutingReport:
    """Return the routing report of a finished run, over up to `rows` rows of each task.

    Raises InputRefused where there is no finished adapter or the base is another, DamagedFile.
    """
    opened = open_run(run, allow_changed=allow_changed)
    tasks = prepare(opened.recipe.data, opened.tokenizer, opened.recipe.train.seed, opened.clock)
    chosen = [rows_to_watch(task, rows) for task in tasks]
    watch = RoutingWatch(opened.model, len(tasks), asks_all=opened.recipe.tasks_over_experts is not None)
    if watch.routers:
        with watch.watching(), torch.no_grad():
            _run_through([row for part in chosen for row in part], opened.model, opened.tokenizer.pad_token_id)
    names = [task.task.name for task in tasks]
    return routing_report(watch, opened.model, names, rows_seen(tasks, chosen), None)


def inspect_where_due(
    run: str | Path, *, again: bool = False, rows: int = ROWS_OF_A_TASK, allow_changed: Collection[str] = ()
) -> None:
    """Write `routing.json` of a run that is finished and has none, or `again`. Raises InputRefused, DamagedFile."""
    folder = RunFolder(Path(run))
    is_finished = is_run(run) and (folder.adapter / "adapter_model.safetensors").is_file()
    if again or (is_finished and not folder.routing.is_file()):
        write_routing(folder, inspect_run(run, rows=rows, allow_changed=allow_changed))


def rows_to_watch(task: TaskRows, limit: int) -> list[Row]:
    """Return up to `limit` rows of a task, spread evenly: held-out ones, or where there are none training rows."""
    rows = task.validation or task.train
    places = np.linspace(0, len(rows) - 1, min(limit, len(rows))).round().astype(int)
    return [rows[place] for place in places.tolist()]


def rows_seen(tasks: Sequence[TaskRows], chosen: Sequence[Sequence[Row]]) -> dict[str, dict[str, int]]:
    """Return how many held-out or training rows of each task were looked at."""
    return {
        task.task.name: {"held out" if task.validation else "training": len(rows)}
        for task, rows in zip(tasks, chosen, strict=True)
    }


def _run_through(rows: list[Row], model: PeftModel, pad: int) -> None:
    # Rows of like length together, so that little of a batch is padding.
    by_length = sorted(rows, key=lambda row: len(row.ids))
    for start in range(0, len(by_length), ROWS_AT_ONCE):
        batch = collate(by_length[start : start + ROWS_AT_ONCE], pad)
        batch = {name: tensor.to(device_of(model)) for name, tensor in batch.items()}
        labelled_states(model, batch)


__all__ = ["ROWS_OF_A_TASK", "TRAINING_ROWS", "inspect_run", "inspect_where_due", "rows_seen", "rows_to_watch"]
