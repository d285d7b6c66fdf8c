"""Which rows an export is fitted, checked and measured on, and how they come in batches."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from qd2mora.data import Mixture, Row, collate, prepare
from qd2mora.merging.setting import Batches
from qd2mora.run_folder import OpenRun

CALIBRATION_ROWS, CHECKING_ROWS, HELD_OUT_ROWS = 512, 128, 512
ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class Sample:
    """Rows of one or all tasks: `calibration` and `checking` are different training rows.

    `trained_rows`: how many rows the training went over, repeats counted.
    """

    calibration: list[Row]
    checking: list[Row]
    held_out: list[Row]
    trained_rows: int


def sample_rows(opened: OpenRun, number: int | None) -> Sample:
    """Return rows evenly over tasks (or of task `number`), up to the limits, the same for the same run."""
    tasks = prepare(opened.recipe.data, opened.tokenizer, opened.recipe.train.seed)
    chosen = tasks if number is None else [tasks[number]]
    generator = np.random.default_rng(opened.recipe.train.seed)
    calibration: list[Row] = []
    checking: list[Row] = []
    held_out: list[Row] = []
    for task in chosen:
        order = generator.permutation(len(task.train)).tolist()
        num_checking = min(CHECKING_ROWS // len(chosen), len(order) // 5)
        checking += [task.train[place] for place in sorted(order[:num_checking])]
        fitted = order[num_checking : num_checking + CALIBRATION_ROWS // len(chosen)]
        calibration += [task.train[place] for place in sorted(fitted)]
        places = generator.permutation(len(task.validation))[: HELD_OUT_ROWS // len(chosen)]
        held_out += [task.validation[place] for place in sorted(places.tolist())]
    train = opened.recipe.train
    epochs = train.epochs or 0
    mixture = Mixture(opened.recipe.data, tasks, train.seed)
    if train.steps:
        trained = train.steps * train.global_batch
    else:
        trained = math.ceil(epochs * mixture.rows_per_epoch) if epochs else mixture.rows_until_stop()
    return Sample(calibration, checking, held_out, trained)


def batches_of(opened: OpenRun, rows: list[Row], vector: list[float] | None = None) -> Batches:
    """Return padded batches, rows of similar length together; `vector` in the place of what rows bring."""
    pad = opened.tokenizer.pad_token_id
    by_length = sorted(rows, key=lambda row: len(row.ids))
    parts = [by_length[start : start + ROWS_AT_ONCE] for start in range(0, len(by_length), ROWS_AT_ONCE)]
    device = opened.model.device
    batches = [{name: tensor.to(device) for name, tensor in collate(part, pad).items()} for part in parts]
    if vector is not None:
        batches = [
            batch | {"external": torch.tensor([vector] * len(batch["labels"]), device=device)} for batch in batches
        ]
    return batches


__all__ = ["Sample", "batches_of", "sample_rows"]
