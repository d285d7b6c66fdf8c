"""Random numbers of a layer as functions of a key: nothing to save but the key, the same again in the backward pass.

With row keys a row's numbers depend on (its key, the layer, the purpose) and its own length alone: not on the rows
beside it, the padding, or how a step is split into micro batches. Without, one seed serves the whole tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qd2mora.mixture import masks
from qd2mora.mixture.kernels import kernels_for
from qd2mora.mixture.masks import Span

# splitmix64's increment, 2^64 over the golden ratio; a torch generator takes seeds of 63 bits.
_PRIME = 0x9E3779B97F4A7C15
_LARGEST = (1 << 63) - 1
_LEVELS = 1 << 16
_BLOCK = {"cpu": 1 << 16}
_LONG_BLOCK = 1 << 22
"""Numbers of a mask drawn at once: what a CPU's cache holds; elsewhere what few launches need, 8 MiB."""

Fill = Callable[[Tensor, torch.Generator], Tensor]
"""Fills a contiguous part of the result in place, and returns it."""


@dataclass(frozen=True)
class Rows:
    """The rows of one pass: a key for each with its length, or a single key for whatever comes.

    `places`: the line of the tensor and the place in it where each row begins, where rows are packed.
    """

    keys: tuple[int, ...]
    lengths: tuple[int, ...] | None = None
    places: tuple[tuple[int, int], ...] | None = None
    _spans: dict[int, list[Span]] = field(default_factory=dict, repr=False, compare=False)
    _tables: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def spans(self, tokens: int) -> list[Span]:
        """Return key, line, first token and tokens of each row in lines of so many tokens; made once a pass."""
        if tokens not in self._spans:
            self._spans[tokens] = self._spans_in(tokens)
        return self._spans[tokens]

    def _spans_in(self, tokens: int) -> list[Span]:
        if self.lengths is None:
            return [(self.keys[0], 0, 0, tokens)]
        places = self.places or tuple((row, 0) for row in range(len(self.keys)))
        # A gate of a whole row has one entry along the tokens.
        return [
            (key, line, start, min(length, tokens - start))
            for (line, start), key, length in zip(places, self.keys, self.lengths, strict=True)
        ]

    def table(self, tokens: int, device: torch.device) -> Tensor:
        """Return the spans, (R, 4) int64, on a device; copied once a pass, without waiting."""
        if (device, tokens) not in self._tables:
            host = torch.tensor(self.spans(tokens), dtype=torch.int64)
            if device.type == "cuda":
                host = host.pin_memory()
            self._tables[device, tokens] = host.to(device, non_blocking=True)
        return self._tables[device, tokens]


@dataclass(frozen=True)
class Draws:
    """Keys of one layer's draws in one forward pass; without a layer, the rows' own keys."""

    rows: Rows
    layer: int | None = None

    def keep(self, like: Tensor, probability: float, purpose: int) -> Tensor:
        """Return 0 with `probability` p, else 1 / (1 - p), in the shape (..., D) and dtype of `like`.

        p is taken to the nearest 1 / 65,536: four masks' numbers come from each 64-bit draw, several times as fast on a
        CPU as one draw a number. On a GPU it is one launch for all rows (`masks`), and other numbers.
        """
        # Never all of them: the scale 1 / (1 - p) stays finite.
        dropped = min(round(probability * _LEVELS), _LEVELS - 1)
        if like.is_cuda:
            return self._keep_on_card(like, dropped, purpose)

        def draw(part: Tensor, generator: torch.Generator) -> Tensor:
            for block in part.view(-1).split(_BLOCK.get(part.device.type, _LONG_BLOCK)):
                # Shifted by half the levels, because a draw of 16 bits is signed.
                words = torch.empty(-(-block.numel() // 4), dtype=torch.int64, device=part.device)
                levels = words.random_(-(1 << 63), None, generator=generator).view(torch.int16)
                torch.ge(levels[: block.numel()], dropped - _LEVELS // 2, out=block)
            return part

        return self._fill(like, purpose, draw).div_(1 - dropped / _LEVELS)

    def normal(self, like: Tensor, purpose: int) -> Tensor:
        """Return standard normal numbers in the shape and dtype of `like`."""
        return self._fill(like, purpose, lambda part, generator: part.normal_(generator=generator))

    def gumbel(self, like: Tensor, purpose: int) -> Tensor:
        """Return standard Gumbel numbers: the largest k of logits + these are k samples without replacement."""
        tiny = torch.finfo(like.dtype).tiny
        uniform = self._fill(like, purpose, lambda part, generator: part.uniform_(tiny, 1, generator=generator))
        # Both logarithms are kept from zero: an infinite number would decide by itself, or give NaN.
        return -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()

    def _keep_on_card(self, like: Tensor, dropped: int, purpose: int) -> Tensor:
        # Padding keeps ones, and every entry of a single stream is written.
        out = torch.ones_like(like, memory_format=torch.contiguous_format)
        lines = out.view(1, -1, out.shape[-1]) if self.rows.lengths is None else out.view(*out.shape[:2], -1)
        layer, spans = self.layer or 0, self.rows.spans(lines.shape[1])
        kernel = kernels_for(like, "mixture.mask_kernel")
        if kernel is None:
            masks.keep(lines, spans, layer, purpose, dropped)
            return out
        longest = max(length for *_, length in spans)
        kernel.keep(lines, self.rows.table(lines.shape[1], like.device), longest, layer, purpose, dropped)
        return out

    def _fill(self, like: Tensor, purpose: int, draw: Fill) -> Tensor:
        if self.rows.lengths is None:  # one key for all: other people's trainers tell no rows
            made = torch.empty_like(like, memory_format=torch.contiguous_format)
            return draw(made, self._generator(like, self.rows.keys[0], purpose))
        # Padding keeps ones: nobody reads it, and drawing it would tie a row's numbers to the rows beside it.
        out = torch.ones_like(like, memory_format=torch.contiguous_format)
        for key, line, start, length in self.rows.spans(like.shape[1]):
            draw(out[line, start : start + length], self._generator(like, key, purpose))
        return out

    def _generator(self, like: Tensor, key: int, purpose: int) -> torch.Generator:
        if self.layer is not None:
            key = mixed(key, self.layer)
        return torch.Generator(device=like.device).manual_seed(mixed(key, purpose))


def mixed(*parts: int) -> int:
    """Return one 63-bit key of several numbers (splitmix64's finaliser, part by part)."""
    # Neighbouring keys (rows 7 and 8, purposes 0 and 1) must give streams that have nothing in common.
    key = 0
    for part in parts:
        key = ((key ^ part) + _PRIME) & ((1 << 64) - 1)
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
        key ^= key >> 31
    return key & _LARGEST


__all__ = ["Draws", "Rows", "mixed"]
