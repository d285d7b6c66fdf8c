"""Dropout masks as one Triton launch: `masks.keep` with every row at once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qd2mora.mixture.masks import A_DRAW, LEVELS

DRAWS = 256
"""Draws of one program, 2,048 entries."""


def try_out(device: torch.device) -> None:
    """Launch the smallest mask once. Raises what Triton raises where it cannot compile or launch."""
    rows = torch.tensor([[1, 0, 0, 1]], device=device)
    keep(torch.ones(1, 1, 1, device=device), rows, 1, 0, 0, 1)


def keep(out: Tensor, rows: Tensor, longest: int, layer: int, purpose: int, dropped: int) -> Tensor:
    """Write a mask into the rows of `out` (L, T, D), contiguous, as `masks.keep` does; `rows` is
    (R, 4) int64 on the device.

    `longest`: tokens of the longest row, which the host knows.
    """
    tokens, width = out.shape[1:]
    grid = (rows.shape[0], triton.cdiv(longest * width, A_DRAW * DRAWS))
    scale = LEVELS / (LEVELS - dropped)
    _keep[grid](out, rows, tokens, width, _signed(layer), purpose, dropped, scale, DRAWS=DRAWS)
    return out


def _signed(word: int) -> int:
    """Return 32 bits as a signed number: Triton compiles anew for an argument that needs more of them."""
    return word - (1 << 32) * (word >> 31)


# Whatever these numbers are, one compilation serves: they differ by layer and mask.
@triton.jit(do_not_specialize=["T", "layer", "purpose", "dropped"])
def _keep(out_ptr, rows_ptr, T, D, layer, purpose, dropped, scale, DRAWS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = rows_ptr + tl.program_id(0) * 4
    key, line, start, length = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    number = tl.program_id(1).to(tl.int64) * DRAWS + tl.arange(0, DRAWS)
    low, high = (number & 0xFFFFFFFF).to(tl.uint32), (number >> 32).to(tl.uint32)
    which, where = (number * 0 + purpose).to(tl.uint32), (number * 0 + layer).to(tl.uint32)
    c0, c1, c2, c3 = tl.philox(key, low, high, which, where)
    # Two entries of each word, its lower half first.
    place = tl.arange(0, 8)[None, :]
    first = tl.where(place < 2, c0[:, None], c1[:, None])
    word = tl.where(place < 4, first, tl.where(place < 6, c2[:, None], c3[:, None]))
    level = tl.where((place & 1) == 0, word & 0xFFFF, word >> 16)
    value = tl.where(level >= dropped, scale, 0.0)
    entry = number[:, None] * 8 + place
    tl.store(out_ptr + (line * T + start) * D + entry, value, mask=entry < length * D)


__all__ = ["keep", "try_out"]
