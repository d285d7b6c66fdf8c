"""Packing: several rows in one line of tokens, so that little of a batch is padding.

The rows of a step stay what they are; only how they share lines changes. Positions restart at each row; from that,
attention keeps the rows of a line apart.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace

import torch
from torch import Tensor

from qd2mora.data.collate import collate
from qd2mora.data.prepare import IGNORE, Row

MULTIPLE = 8
WIDTHS_TRIED = 16


@dataclass(frozen=True)
class MicroBatch:
    """Rows that run together. `keys`: one for each row's random numbers; `packs`: how many rows each line takes, in
    order, where rows are packed."""

    rows: list[Row]
    keys: tuple[int, ...]
    packs: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows)

    @property
    def num_labels(self) -> int:
        return sum(row.num_labels for row in self.rows)

    @property
    def places(self) -> tuple[tuple[int, int], ...] | None:
        """The line and the place in it where each row begins; None where every row has its own."""
        if not self.packs:
            return None
        places, rest = [], iter(self.rows)
        for line, count in enumerate(self.packs):
            start = 0
            for _ in range(count):
                places.append((line, start))
                start += len(next(rest).ids)
        return tuple(places)

    def collated(self, pad: int) -> dict[str, Tensor]:
        """Return the batch that the loss takes."""
        return collate_packed(self, pad) if self.packs else collate(self.rows, pad, MULTIPLE)


def lines_together(
    lengths: Sequence[int], at_once: int, capacity: int | None
) -> list[tuple[list[int], tuple[int, ...]]]:
    """Return the rows of each micro batch of `at_once` lines by number, and how many rows each line takes.

    Without `capacity` a line is a row, and nothing is said of how many it takes. Lines of like length go together.
    """
    if capacity is None:
        lines = [[number] for number in sorted(range(len(lengths)), key=lengths.__getitem__)]
    else:
        lines = packed(lengths, capacity, at_once)
    parts = [lines[start : start + at_once] for start in range(0, len(lines), at_once)]
    return [
        ([number for line in part for number in line], () if capacity is None else tuple(map(len, part)))
        for part in parts
    ]


def packed(lengths: Sequence[int], capacity: int, at_once: int = 1) -> list[list[int]]:
    """Return which rows share a line of at most `capacity` tokens, the longest line first, by their numbers.

    Of best fits into lines of several widths, and of rows spread evenly over as few lines, the one that runs over the
    least positions where `at_once` lines run together.
    """
    longest = max(lengths)
    least = max(longest, capacity // 2)
    widths = {max(longest, least + (capacity - least) * part // WIDTHS_TRIED) for part in range(WIDTHS_TRIED + 1)}
    tried = [_best_fit(lengths, width) for width in sorted(widths, reverse=True)]
    even = _evenly(lengths, len(tried[0]))
    if max(sum(lengths[number] for number in line) for line in even) <= max(capacity, longest):
        tried.append(even)
    ordered = [sorted(lines, key=lambda line: -sum(lengths[number] for number in line)) for lines in tried]
    return min(ordered, key=lambda lines: _positions(lines, lengths, at_once))


def _positions(lines: list[list[int]], lengths: Sequence[int], at_once: int) -> int:
    """Return how many positions a step runs over, padding included."""
    sizes = [sum(lengths[number] for number in line) for line in lines]
    starts = range(0, len(sizes), at_once)
    return sum(-(-sizes[start] // MULTIPLE) * MULTIPLE * len(sizes[start : start + at_once]) for start in starts)


def _evenly(lengths: Sequence[int], num_lines: int) -> list[list[int]]:
    """Put each row, the longest first, into the line that has least."""
    lines: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(num_lines)]
    for number in _longest_first(lengths):
        used, line, numbers = lines[0]
        heapreplace(lines, (used + lengths[number], line, [*numbers, number]))
    return [numbers for _, _, numbers in lines]


def _best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put each row, the longest first, where the least room is left after it."""
    lines: list[list[int]] = []
    room: list[tuple[int, int]] = []  # sorted: what is left in a line, and its number
    for number in _longest_first(lengths):
        place = bisect_left(room, (lengths[number], -1))
        if place == len(room):
            lines.append([])
            left, line = max(capacity, lengths[number]), len(lines) - 1
        else:
            left, line = room.pop(place)
        lines[line].append(number)
        insort(room, (left - lengths[number], line))
    return lines


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))


def collate_packed(batch: MicroBatch, pad: int) -> dict[str, Tensor]:
    """Return input_ids, labels, position_ids, segments (lines, longest line rounded up), int64; task_index (rows,).

    `segments` numbers the batch's rows, -1 is padding. There is no attention_mask: without one, attention is bounded by
    where positions restart, padding included.
    """
    places = batch.places
    assert places is not None
    ends = [start + len(row.ids) for (_, start), row in zip(places, batch.rows, strict=True)]
    width = -(-max(ends) // MULTIPLE) * MULTIPLE
    shape = (len(batch.packs), width)
    ids, labels = torch.full(shape, pad), torch.full(shape, IGNORE)
    segments, positions = torch.full(shape, -1), torch.zeros(shape, dtype=torch.int64)
    for number, ((line, start), row) in enumerate(zip(places, batch.rows, strict=True)):
        tokens = torch.from_numpy(row.ids.astype("int64"))
        stop = start + len(tokens)
        ids[line, start:stop] = tokens
        segments[line, start:stop] = number
        positions[line, start:] = torch.arange(width - start)
        for first, last in (*row.earlier, (row.masked, len(tokens))):
            first = max(first, 1)  # a row's first token would be told by the row before it
            labels[line, start + first : start + last] = tokens[first:last]
        positions[line, stop:] = torch.arange(width - stop)
    batch_of = {"input_ids": ids, "labels": labels, "position_ids": positions, "segments": segments}
    return batch_of | {"task_index": torch.tensor([row.task for row in batch.rows])}


__all__ = ["MULTIPLE", "MicroBatch", "collate_packed", "lines_together", "packed"]
