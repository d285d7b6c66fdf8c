"""Dropout masks of a GPU as functions of a place: no generator, no state, one launch for all rows of a mask.

Each entry of a row is kept or dropped by 16 bits of Philox4x32-10 (Salmon et al., SC 2011), the counter-based generator
that CUDA's libraries and Triton have. Its key is the row's; its counter is where the entry lies in the row, which mask
it is and in which layer. So a row's mask depends on nothing beside the row, and is the same in the backward pass, in
any micro batch and in packed lines. `mask_kernel` writes it where Triton runs; `keep` here is the plain twin, equal to
the bit, for GPUs without Triton.

CPUs take `draws`, whose generator is several times as fast there: their masks are other numbers with the same odds.

Shapes: L lines, T tokens of a line, D width, R rows.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Span: TypeAlias = tuple[int, int, int, int]
"""Key of 63 bits, line, first token, tokens."""
ROUNDS = 10
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
A_DRAW = 8
"""Entries by one draw: four words of 32 bits, 16 bits an entry."""
LEVELS = 1 << 16
_AT_ONCE = 1 << 15
"""Draws at once in the twin, whose temporaries are then 256 KiB each."""


def keep(out: Tensor, rows: Sequence[Span], layer: int, purpose: int, dropped: int) -> Tensor:
    """Write a mask into the rows of `out` (L, T, D), contiguous; what is in no row stays. Returns `out`.

    `rows`: key, line, first token and tokens of each. An entry is 0 with odds `dropped` / 65,536, else
    the scale 65,536 / (65,536 - dropped). `layer` and `purpose` are below 2^32.
    """
    for key, line, start, length in rows:
        entries = out[line, start : start + length].reshape(-1)  # a view: tokens of a line lie side by side
        for first in range(0, entries.numel(), A_DRAW * _AT_ONCE):
            part = entries[first : first + A_DRAW * _AT_ONCE]
            number = torch.arange(first // A_DRAW, -(-(first + part.numel()) // A_DRAW), device=out.device)
            part.copy_(_kept(number, key, layer, purpose, dropped)[: part.numel()])
    return out


def _kept(number: Tensor, key: int, layer: int, purpose: int, dropped: int) -> Tensor:
    """Return the mask's entries of these draws, (draws * 8,) float32."""
    words = philox(number, key, purpose, layer)
    levels = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1)
    return (levels >= dropped).view(-1) * (LEVELS / (LEVELS - dropped))


def philox(number: Tensor, key: int, purpose: int, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four words of 32 bits, each an int64 tensor like `number` (...) int64.

    The counter is the 64 bits of `number`, then `purpose` and `layer`.
    """
    c0, c1 = number & _LOW, (number >> 32) & _LOW
    c2, c3 = torch.full_like(number, purpose & _LOW), torch.full_like(number, layer & _LOW)
    k0, k1 = key & _LOW, (key >> 32) & _LOW
    for _ in range(ROUNDS):
        high_a, low_a = _product(c0, _ROUND_A)
        high_b, low_b = _product(c2, _ROUND_B)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _KEY_A) & _LOW, (k1 + _KEY_B) & _LOW
    return c0, c1, c2, c3


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower 32 bits of a product of two words of 32 bits."""
    # By halves of one factor: the whole product needs 64 bits without a sign, which int64 has not.
    of_low, of_high = (word & 0xFFFF) * factor, (word >> 16) * factor
    total = of_high + (of_low >> 16)
    return total >> 16, ((total & 0xFFFF) << 16) | (of_low & 0xFFFF)


__all__ = ["A_DRAW", "LEVELS", "ROUNDS", "Span", "keep", "philox"]
