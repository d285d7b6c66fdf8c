"""Packing: several rows in one line of tokens, so that little of a batch is padding.

The rows of a step stay what they are; only how they share lines changes. Positions restart at each row; from that,
attention keeps the rows of a line apart.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qd2mora.base.passes import IGNORE
from qd2mora.data.collate import collate
from qd2mora.data.token_rows import Row

MULTIPLE = 8
ENOUGH = 0.005
"""Share of padding at which no better lines are looked for."""
SEEN = 64
"""Rows among which those that fill a line are looked for."""


Part = tuple[list[int], tuple[int, ...]]
"""Rows of a micro batch by number, and how many rows each of its lines takes."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows that run together. `keys`: one for each row's random numbers; `packs`: how many rows each line takes, in
    order, where rows are packed; `weight` 0: they run where they must and count for nothing."""

    rows: list[Row]
    keys: tuple[int, ...]
    packs: tuple[int, ...] = ()
    weight: float = 1.0

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


def lines_together(lengths: Sequence[int], at_once: int, capacity: int | None) -> list[Part]:
    """Return the rows of each micro batch of `at_once` lines by number, and how many rows each line takes.

    Without `capacity` a line is a row, and nothing is said of how many it takes. Lines of like length go together.
    """
    if capacity is None:
        # Shortest first: neighbours differ least, so a micro batch is padded least.
        lines = [[number] for number in sorted(range(len(lengths)), key=lengths.__getitem__)]
    else:
        lines = packed(lengths, capacity, at_once)
    parts = [lines[start : start + at_once] for start in range(0, len(lines), at_once)]
    return [
        ([number for line in part for number in line], () if capacity is None else tuple(map(len, part)))
        for part in parts
    ]


def dealt(parts: Sequence[Part], index: int, count: int, in_step: bool) -> list[tuple[Part, float]]:
    """Return the micro batches of one of `count` processes, each with its weight.

    `in_step`: all have as many, as where they gather weights together; who has one less runs the first for nothing.
    """
    weighted = [(part, 1.0) for part in parts]
    if in_step and parts:
        # A pass that gathers weights waits for every process: it runs for company, and its loss counts nothing.
        weighted += [(parts[0], 0.0)] * (-len(parts) % count)
    return weighted[index::count]


def packed(lengths: Sequence[int], capacity: int, at_once: int = 1) -> list[list[int]]:
    """Return which rows share a line of at most `capacity` tokens, the longest line first, by their numbers.

    Of lines filled to several widths, those are taken that run over the least positions where `at_once` lines run
    together; the first that waste no more than ENOUGH end the search. The same lengths give the same lines.
    """
    found: list[list[int]] = []
    least = 0
    # Filling to the brim leaves a last short line beside full ones; even lines of less waste less padding.
    for width in _widths(lengths, capacity, at_once):
        lines = sorted(_filled(lengths, width), key=lambda line: -sum(lengths[number] for number in line))
        positions = _positions(lines, lengths, at_once)
        if not found or positions < least:
            found, least = lines, positions
        if least <= (1 + ENOUGH) * sum(lengths):
            break
    return found


def _widths(lengths: Sequence[int], capacity: int, at_once: int) -> Iterator[int]:
    """Yield what a line may hold: an even share for each number of lines that takes no more micro batches, and more."""
    total = sum(lengths)
    fewest = -(-total // capacity)
    # Rows seldom fill even shares to the token; a little more room often saves a line.
    for more in range(0, 6 * MULTIPLE, MULTIPLE):
        for number in range(fewest, max(-(-fewest // at_once) * at_once, fewest + 1) + 1):
            share = -(-total // (number * MULTIPLE)) * MULTIPLE
            yield min(share + more, capacity)


def _positions(lines: list[list[int]], lengths: Sequence[int], at_once: int) -> int:
    """Return how many positions a step runs over, padding included."""
    sizes = [sum(lengths[number] for number in line) for line in lines]
    starts = range(0, len(sizes), at_once)
    return sum(-(-sizes[start] // MULTIPLE) * MULTIPLE * len(sizes[start : start + at_once]) for start in starts)


def _filled(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Fill line after line: the longest row that is left, and those of the others that fill its line best.

    A row that is longer than `width` has a line of its own.
    """
    left = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    lines = []
    while left:
        first, *others = left
        if len(others) > SEEN:  # long and short ones alike
            others = [others[len(others) * place // SEEN] for place in range(SEEN)]
        line = [first, *_best_sum(others, lengths, width - lengths[first])]
        lines.append(line)
        left = [number for number in left if number not in line]
    return lines


def _best_sum(numbers: Sequence[int], lengths: Sequence[int], room: int) -> list[int]:
    """Return the rows whose lengths sum up to the most that `room` holds (bit n of `reached`: a sum of n)."""
    room = max(room, 0)
    # Sums above the room are cut off, so that numbers stay `room` bits long.
    kept = (1 << room + 1) - 1
    reached = [1]
    for number in numbers:
        reached.append((reached[-1] | reached[-1] << lengths[number]) & kept)
        if reached[-1] >> room:
            break
    total, chosen = reached[-1].bit_length() - 1, []
    for number, before in reversed(list(zip(numbers, reached[:-1], strict=False))):
        # Backwards: a sum that was not within reach before this row needs the row.
        if not before >> total & 1:
            chosen.append(number)
            total -= lengths[number]
    return chosen


def collate_packed(batch: MicroBatch, pad: int) -> dict[str, Tensor]:
    """Return input_ids, labels, position_ids, segments (lines, longest line rounded up), int64; task_index (rows,).

    Where the data marks spans, also `marks` as `collate` has them.

    `segments` numbers the batch's rows, -1 is padding. There is no attention_mask: without one, attention is bounded by
    where positions restart, padding included.
    """
    places, told = batch.places, {"task_index": torch.tensor([row.task for row in batch.rows])}
    assert places is not None
    ends = [start + len(row.ids) for (_, start), row in zip(places, batch.rows, strict=True)]
    width = -(-max(ends) // MULTIPLE) * MULTIPLE
    shape = (len(batch.packs), width)
    ids, labels = torch.full(shape, pad), torch.full(shape, IGNORE)
    marks = torch.zeros(shape, dtype=torch.int64)
    segments, positions = torch.full(shape, -1), torch.zeros(shape, dtype=torch.int64)
    for number, ((line, start), row) in enumerate(zip(places, batch.rows, strict=True)):
        tokens = torch.from_numpy(row.ids.astype("int64"))
        stop = start + len(tokens)
        ids[line, start:stop] = tokens
        # Routers tell rows apart by these; attention by positions alone.
        segments[line, start:stop] = number
        positions[line, start:] = torch.arange(width - start)
        for first, last in (*row.earlier, (row.masked, len(tokens))):
            first = max(first, 1)  # a row's first token would be told by the row before it
            labels[line, start + first : start + last] = tokens[first:last]
        for mark, first, last in row.marks or ():
            marks[line, start + first : min(start + last, stop)] = mark
        # Padding behind the last row counts from 0 as a row of its own does: attention keeps the rows out of it.
        positions[line, stop:] = torch.arange(width - stop)
    if any(row.marks is not None for row in batch.rows):
        told["marks"] = marks
    batch_of = {"input_ids": ids, "labels": labels, "position_ids": positions, "segments": segments}
    return batch_of | told


__all__ = ["MULTIPLE", "MicroBatch", "collate_packed", "dealt", "lines_together", "packed"]
