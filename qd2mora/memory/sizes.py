"""Bytes of 4-bit weights, of what is trained and of its moments, to the byte, from numbers of entries alone."""

from qd2mora.memory.activations import FLOAT
from qd2mora.recipe.optimizers import OPTIMIZERS, OptimizerName

BLOCK, NESTED_BLOCK = 64, 256
CODE_BOOK, NESTED_TABLES = 16 * 4, 256 * 4 + 4
"""NF4's 16 values; with double quantisation the 256 values of the maxima, and their offset. Each tensor has its own."""


def nf4_bytes(entries: int, double_quant: bool) -> tuple[int, int]:
    """Return (packed weights, quantisation state) of one tensor.

    Half a byte a weight, and for each 64 weights a float32 maximum; with double quantisation one byte instead, and a
    float32 for each 256 of those.
    """
    # To the byte as bitsandbytes 0.50 lays it out: 4.5 bits a weight, 4.127 doubly quantised (QLoRA, arXiv 2305.14314).
    state = sum(block_maxima(entries, double_quant)) + CODE_BOOK
    if double_quant:
        state += NESTED_TABLES
    return -(-entries // 2), state


def block_maxima(entries: int, double_quant: bool) -> list[int]:
    """Return the bytes of each tensor of block maxima that goes with a 4-bit weight."""
    blocks = -(-entries // BLOCK)
    if double_quant:
        return [blocks, 4 * -(-blocks // NESTED_BLOCK)]
    return [4 * blocks]


def dequantised_bytes(entries: int, double_quant: bool, item: int) -> int:
    """Return the bytes of one weight while it is dequantised: itself, and its block maxima as float32."""
    size = entries * item
    if double_quant:
        size += 4 * -(-entries // BLOCK)
    return size


def trainable_bytes(tensors: tuple[int, ...], optimizer: OptimizerName) -> dict[str, int]:
    """Return the bytes of float32 adapters, their gradients and the moments; `tensors` are entries of each."""
    return {
        "adapters": 4 * sum(tensors),
        "gradients": 4 * sum(tensors),
        "optimizer state": OPTIMIZERS[optimizer].state_bytes(tensors),
    }


def penalty_bytes(at_once: int, weight: float) -> int:
    """Return the bytes of the penalty and its gradient; `at_once` are the entries of its largest group of banks.

    Each group is stacked; its gradient comes as two halves that are added. Without a weight it is only read.
    """
    if weight > 0:
        # The stack, and the two halves of its gradient.
        at_once *= 3
    return FLOAT * at_once


__all__ = ["block_maxima", "dequantised_bytes", "nf4_bytes", "penalty_bytes", "trainable_bytes"]
