"""Bytes of 4-bit weights, of what is trained and of its moments, to the byte, from numbers of entries alone."""

from qd2mora.memory.activations import FLOAT

BLOCK, NESTED_BLOCK = 64, 256
CODE_BOOK, NESTED_TABLES = 16 * 4, 256 * 4 + 4
"""NF4's 16 values; with double quantisation the 256 values of the maxima, and their offset. Each tensor has its own."""
MOMENT_BLOCK, SMALLEST_8BIT = 256, 4096
"""bitsandbytes keeps one float32 maximum for each block of moments, and 32-bit moments of smaller tensors."""
MOMENT_TABLES = 2 * 256 * 4


def nf4_bytes(entries: int, double_quant: bool) -> tuple[int, int]:
    """Return (packed weights, quantisation state) of one tensor.

    Half a byte a weight, and for each 64 weights a float32 maximum; with double quantisation one byte instead, and a
    float32 for each 256 of those.
    """
    blocks = -(-entries // BLOCK)
    if double_quant:
        return -(-entries // 2), blocks + 4 * -(-blocks // NESTED_BLOCK) + CODE_BOOK + NESTED_TABLES
    return -(-entries // 2), 4 * blocks + CODE_BOOK


def dequantised_bytes(entries: int, double_quant: bool, item: int) -> int:
    """Return the bytes of one weight while it is dequantised: itself, and its block maxima as float32."""
    return entries * item + (4 * -(-entries // BLOCK) if double_quant else 0)


def trainable_bytes(tensors: tuple[int, ...], optimizer: str) -> dict[str, int]:
    """Return the bytes of float32 adapters, their gradients and the moments; `tensors` are entries of each."""
    return {
        "adapters": 4 * sum(tensors),
        "gradients": 4 * sum(tensors),
        "optimizer state": optimizer_bytes(tensors, optimizer),
    }


def optimizer_bytes(tensors: tuple[int, ...], optimizer: str) -> int:
    """Return the bytes of both moments; paged moments count in full, as they are while there is room.

    PyTorch's fused AdamW keeps a float32 step counter for each tensor besides.
    """
    if optimizer == "adamw":
        return 8 * sum(tensors) + 4 * len(tensors)
    large = [entries for entries in tensors if entries >= SMALLEST_8BIT]
    blocks = sum(-(-entries // MOMENT_BLOCK) for entries in large)
    small = sum(tensors) - sum(large)
    return 2 * sum(large) + 8 * blocks + (MOMENT_TABLES if large else 0) + 8 * small


def penalty_bytes(at_once: int, weight: float) -> int:
    """Return the bytes of the penalty and its gradient; `at_once` are the entries of its largest group of banks.

    Each group is stacked; its gradient comes as two halves that are added. Without a weight it is only read.
    """
    return FLOAT * (3 * at_once if weight > 0 else at_once)


__all__ = ["dequantised_bytes", "nf4_bytes", "optimizer_bytes", "penalty_bytes", "trainable_bytes"]
