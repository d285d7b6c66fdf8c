"""Rows that compositions are measured and fitted on: training rows of a recipe, evenly over its tasks."""

import numpy as np
from transformers import PreTrainedTokenizerBase

from qd2mora.data import Row, prepare
from qd2mora.recipe import Recipe

ROWS = 256
"""Rows that weights are learned, and uses measured, on."""
ROWS_AT_ONCE = 8


def sampled(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, number: int) -> list[Row]:
    """Return about `number` training rows in random order, the same for the same recipe."""
    order = np.random.default_rng(recipe.train.seed)
    # Evenly over tasks, whatever their sizes: what is composed has to serve each of them.
    rows: list[Row] = []
    tasks = prepare(recipe.data, tokenizer, recipe.train.seed)
    for task in tasks:
        places = order.permutation(len(task.train))[: -(-number // len(tasks))]
        rows += [task.train[place] for place in places.tolist()]
    return [rows[place] for place in order.permutation(len(rows)).tolist()]


def parts_of(rows: list[Row]) -> list[list[Row]]:
    """Return the rows in batches."""
    return [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]


__all__ = ["ROWS", "parts_of", "sampled"]
