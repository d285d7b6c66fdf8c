"""A merge before its start: what making and measuring may take, from a few passes of the run's own model."""

import time
from pathlib import Path

import torch

from qd2mora.merging.auto import SHARE
from qd2mora.merging.distill import ROWS_A_STEP
from qd2mora.merging.measured_updates import strategy_inputs_of, task_number
from qd2mora.merging.original_base import why_not_original
from qd2mora.merging.sample import Sample, batches_of, sample_rows
from qd2mora.merging.sequential import stages
from qd2mora.merging.statistics import decode
from qd2mora.merging.strategies import DISTILL_STEPS, find_strategy
from qd2mora.merging.strategy_inputs import StrategyInputs, rows_of
from qd2mora.routed.gate import TOKEN
from qd2mora.run_folder import OpenRun, open_run
from qd2mora.terminal.pace import in_words

MEASURED = 2
"""Batches that are timed, after one that warms up."""
PASSES, PASSES_ON_ORIGINAL = 4, 3
"""Forward passes over each held-out row: base, routed, merged, and the linears'; and with the original weights."""


def forecast(
    run: str | Path, strategy: str, task: str | None, measured_rows: int | None, *, allow_changed: tuple[str, ...] = ()
) -> str:
    """Say how long a merge may take. Raises InputRefused, DamagedFile."""
    row = find_strategy(strategy)
    opened = open_run(run, allow_changed=allow_changed)
    rows = sample_rows(opened, task_number(opened, task), row.share, measured_rows)
    timed = list(batches_of(opened, rows.calibration)[: 1 + MEASURED])
    a_row = _seconds_of_a_row(opened, timed)
    inputs = strategy_inputs_of(opened, rows, None)
    making = 0.0
    if opened.routers.depends_on == TOKEN:
        making = _forward_passes(strategy, opened, inputs, rows) * a_row
    passes = PASSES + (0 if why_not_original(opened) else PASSES_ON_ORIGINAL)
    measuring = passes * len(rows.held_out) * a_row
    return (
        f"time: at most about {in_words(making)} making, about {in_words(measuring)} measuring on {len(rows.held_out)} "
        f"rows (estimated from {len(timed)} batches of {len(timed[0]['labels'])} rows; without writing)"
    )


def _seconds_of_a_row(opened: OpenRun, batches: list[dict[str, torch.Tensor]]) -> float:
    seconds = []
    with torch.no_grad():
        for batch in batches:
            began = time.monotonic()
            float(decode(opened.model, batch).float().sum())  # waits for the device
            seconds.append((time.monotonic() - began) / len(batch["labels"]))
    warm = seconds[1:] or seconds
    return sum(warm) / len(warm)


def _forward_passes(strategy: str, opened: OpenRun, inputs: StrategyInputs, rows: Sample) -> float:
    """Return what a strategy costs, in forward passes over one row."""
    if strategy == "auto":
        return SHARE * inputs.trained_rows / inputs.forward
    if strategy == "sequential":
        return float(len(rows.calibration) * len(stages(opened.model)))
    if strategy == "distill":
        return min(DISTILL_STEPS * ROWS_A_STEP, inputs.trained_rows) * (1 + 1 / inputs.forward)
    return 1.4 * rows_of(inputs.calibration)


__all__ = ["forecast"]
