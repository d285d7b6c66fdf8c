"""Rows that share lines: each once, none too many, few lines, and nothing of one row in another's numbers."""

import numpy as np
import pytest
import torch

from qd2mora.base.passes import IGNORE
from qd2mora.data import MicroBatch, Pair, Row, packed
from qd2mora.data.pack import MULTIPLE, collate_packed


def row(*ids: int, masked: int = 1, task: int = 0, earlier: tuple[tuple[int, int], ...] = ()) -> Row:
    return Row(task, np.array(ids, dtype=np.int32), masked, Pair("", ""), 0, earlier)


@pytest.mark.parametrize("seed", range(5))
def test_every_row_lies_in_one_line_that_holds_it(seed: int) -> None:
    chance = np.random.default_rng(seed)
    lengths = np.minimum(chance.geometric(1 / 60, 97) + 3, 256).tolist()
    lines = packed(lengths, 256, 2)
    assert sorted(number for line in lines for number in line) == list(range(97))
    sums = [sum(lengths[number] for number in line) for line in lines]
    assert max(sums) <= 256 and sums == sorted(sums, reverse=True)
    run = sum(len(sums[place : place + 2]) * -(-sums[place] // MULTIPLE) * MULTIPLE for place in range(0, len(sums), 2))
    assert 1 - sum(lengths) / run < 0.01
    assert packed(lengths, 256, 2) == lines


@pytest.mark.parametrize(("rows", "at_once"), [(16, 1), (16, 4), (64, 4), (128, 8)])
def test_less_than_a_fiftieth_of_steps_of_rows_of_many_lengths_is_padding(rows: int, at_once: int) -> None:
    chance = np.random.default_rng(rows)
    used = run = 0
    for _ in range(20):
        lengths = np.minimum(chance.lognormal(4.7, 0.6, rows).astype(int) + 20, 512).tolist()
        sums = [sum(lengths[number] for number in line) for line in packed(lengths, 512, at_once)]
        used += sum(lengths)
        run += sum(
            len(sums[place : place + at_once]) * -(-sums[place] // MULTIPLE) * MULTIPLE
            for place in range(0, len(sums), at_once)
        )
    assert 1 - used / run < 0.02


def test_a_row_alone_and_rows_that_fill_a_line_are_packed() -> None:
    assert packed([5], 512) == [[0]]
    assert packed([8, 8, 8, 8], 16) == [[0, 1], [2, 3]]
    assert packed([16, 16], 16) == [[0], [1]]


def test_positions_labels_and_segments_restart_with_each_row() -> None:
    rows = [row(5, 6, 7, masked=0), row(8, 9, masked=1, task=1), row(4, 5, 6, 7, masked=3, earlier=((1, 2),))]
    batch = collate_packed(MicroBatch(rows, (0, 1, 2), (2, 1)), 3)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 3, 3, 3], [4, 5, 6, 7, 3, 3, 3, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch["segments"].tolist() == [[0, 0, 0, 1, 1, -1, -1, -1], [2, 2, 2, 2, -1, -1, -1, -1]]
    assert batch["task_index"].tolist() == [0, 1, 0]
    no = IGNORE
    assert batch["labels"].tolist() == [[no, 6, 7, no, 9, no, no, no], [no, 5, no, 7, no, no, no, no]]
    assert (batch["labels"] != IGNORE).sum() == sum(each.num_labels for each in rows)


def test_a_batch_says_where_its_rows_begin() -> None:
    rows = [row(*range(3)), row(*range(2)), row(*range(4))]
    assert MicroBatch(rows, (0, 1, 2), (2, 1)).places == ((0, 0), (0, 3), (1, 0))
    assert MicroBatch(rows, (0, 1, 2)).places is None
    assert torch.equal(MicroBatch(rows, (0, 1, 2)).collated(0)["attention_mask"].sum(1), torch.tensor([3, 2, 4]))
