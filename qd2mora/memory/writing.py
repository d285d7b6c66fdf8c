"""What it takes to write answers, many at once: the cache of their keys and values, and the pass over their prompts."""

from qd2mora.memory.activations import Pass, evaluation_bytes
from qd2mora.memory.shapes import Shapes
from qd2mora.memory.sizes import dequantised_bytes
from qd2mora.recipe import Recipe

TEXTS_AT_ONCE = 64
"""Answers that writing begins with; where memory runs out, half as many."""


def texts_at_first(recipe: Recipe) -> int:
    """Return how many answers a run begins to write at once: those of a step, or of a task's held-out rows."""
    if recipe.objective.kind != "grpo":
        return 1
    held_out = [task.validation for task in recipe.data.tasks]
    # How many rows a file holds out nobody has counted yet.
    most = [number if isinstance(number, int) else TEXTS_AT_ONCE for number in held_out]
    return min(TEXTS_AT_ONCE, max(recipe.train.global_batch * (recipe.objective.samples or 1), *most))


def writing_bytes(shapes: Shapes, recipe: Recipe, done: Pass) -> dict[str, int]:
    """Return what answers take while they are written, `done.rows` at once, each as long as there may be any."""
    layer, dequantised = shapes.layer, 0
    if recipe.base.quantization == "nf4":
        dequantised = dequantised_bytes(shapes.largest_linear, recipe.base.double_quant, done.item)
    # A token's keys and values in every layer; while one layer's grow by a token, the old and the new stand together.
    cached = (2 * shapes.num_layers + 1) * layer.cached_width * done.item * done.tokens
    # Logits are made of each text's last token alone.
    reading = evaluation_bytes(layer, shapes.vocab, done, done.rows, dequantised)
    return {"keys and values of answers": cached, "reading prompts": reading}


__all__ = ["TEXTS_AT_ONCE", "texts_at_first", "writing_bytes"]
