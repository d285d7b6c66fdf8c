"""Which rows an export is fitted, checked and measured on, and how they come in batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from torch import Tensor

from qd2mora.base.passes import device_of
from qd2mora.data import Row, TaskMix, collate, prepare
from qd2mora.run_folder import OpenRun

CALIBRATION_ROWS, CHECKING_ROWS, HELD_OUT_ROWS = 512, 128, 512
ROWS_AT_ONCE = 8
SORTED_TOGETHER = 64


@dataclass(frozen=True)
class Sample:
    """Rows of one or all tasks: `calibration`, `checking` and `training` are training rows.

    Those that check are among no others. `trained_rows`: how many rows the training went over, repeats counted.
    """

    calibration: list[Row]
    checking: list[Row]
    training: list[Row]
    held_out: list[Row]
    trained_rows: int


class PaddedBatches(Sequence[dict[str, Tensor]]):
    """Batches of rows, padded and put on the model's device when they are read."""

    def __init__(self, parts: list[list[Row]], pad: int, device: torch.device, vector: list[float] | None) -> None:
        self.parts, self.pad, self.device, self.vector = parts, pad, device, vector

    def __len__(self) -> int:
        return len(self.parts)

    @overload
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> "PaddedBatches": ...
    def __getitem__(self, index: int | slice) -> "dict[str, Tensor] | PaddedBatches":
        """Return one batch, or some of them."""
        if isinstance(index, slice):
            return PaddedBatches(self.parts[index], self.pad, self.device, self.vector)
        batch = {name: tensor.to(self.device) for name, tensor in collate(self.parts[index], self.pad).items()}
        if self.vector is not None:
            batch["external"] = torch.tensor([self.vector] * len(batch["labels"]), device=self.device)
        return batch


def sample_rows(opened: OpenRun, number: int | None, share: float = 1.0, measured_rows: int | None = None) -> Sample:
    """Return rows evenly over tasks (or of task `number`), up to the limits, the same for the same run.

    `share`: of the training's own cost that the work may take; with little, fewer rows are calibrated and checked on.
    `measured_rows`: how many held-out rows, up to HELD_OUT_ROWS where None.
    """
    tasks = prepare(opened.recipe.data, opened.tokenizer, opened.recipe.train.seed, opened.clock)
    train = opened.recipe.train
    epochs = train.epochs or 0
    mixture = TaskMix(opened.recipe.data, tasks, train.seed)
    if train.steps:
        trained = train.steps * train.global_batch
    else:
        trained = math.ceil(epochs * mixture.rows_per_epoch) if epochs else mixture.rows_until_stop()
    # Of what may be spent a fifth goes to calibration rows and less to checking rows, which every candidate runs over.
    calibrated = int(min(CALIBRATION_ROWS, max(64, share * trained / 5)))
    checked = int(min(CHECKING_ROWS, max(16, share * trained / 40)))
    chosen = tasks if number is None else [tasks[number]]
    generator = np.random.default_rng(opened.recipe.train.seed)
    sample = Sample([], [], [], [], trained)
    for which, task in enumerate(chosen):
        order = generator.permutation(len(task.train)).tolist()
        # Checking rows are set aside first, so that neither calibration nor distillation ever sees them.
        num_checking = min(math.ceil(checked / len(chosen)), len(order) // 5)
        sample.checking.extend(task.train[place] for place in sorted(order[:num_checking]))
        sample.training.extend(task.train[place] for place in order[num_checking:])
        fitted = order[num_checking : num_checking + math.ceil(calibrated / len(chosen))]
        sample.calibration.extend(task.train[place] for place in sorted(fitted))
        places = generator.permutation(len(task.validation))[: _rows_of_task(which, len(chosen), measured_rows)]
        sample.held_out.extend(task.validation[place] for place in sorted(places.tolist()))
    order = generator.permutation(len(sample.training)).tolist()
    sample.training[:] = [sample.training[place] for place in order]
    return sample


def _rows_of_task(number: int, num_tasks: int, measured_rows: int | None) -> int:
    """Return how many held-out rows a task gives: as many as the others, but for what does not come out even."""
    if measured_rows is None:
        return HELD_OUT_ROWS // num_tasks
    return measured_rows // num_tasks + (number < measured_rows % num_tasks)


def batches_of(opened: OpenRun, rows: list[Row], vector: list[float] | None = None) -> PaddedBatches:
    """Return batches, rows of similar length together; `vector` in the place of what rows bring."""
    return _padded(opened, _parts(rows, ROWS_AT_ONCE), vector)


def shuffled_batches(
    opened: OpenRun, rows: list[Row], rows_at_once: int, vector: list[float] | None = None
) -> PaddedBatches:
    """Return batches in the order of rows; only neighbours are sorted by length, so that padding stays small."""
    groups = [rows[start : start + SORTED_TOGETHER] for start in range(0, len(rows), SORTED_TOGETHER)]
    return _padded(opened, [part for group in groups for part in _parts(group, rows_at_once)], vector)


def _parts(rows: list[Row], rows_at_once: int) -> list[list[Row]]:
    by_length = sorted(rows, key=lambda row: len(row.ids))
    return [by_length[start : start + rows_at_once] for start in range(0, len(by_length), rows_at_once)]


def _padded(opened: OpenRun, parts: list[list[Row]], vector: list[float] | None) -> PaddedBatches:
    pad = opened.tokenizer.pad_token_id
    return PaddedBatches(parts, pad, device_of(opened.model), vector)


__all__ = ["HELD_OUT_ROWS", "ROWS_AT_ONCE", "PaddedBatches", "Sample", "batches_of", "sample_rows", "shuffled_batches"]
