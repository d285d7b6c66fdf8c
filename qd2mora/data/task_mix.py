"""The order of rows, a pure function of the seed: nothing to save, nothing to restore.

Without weights the tasks are one pile, shuffled anew each epoch. With weights each task has its own endless shuffled
stream, and the next row comes from the task that is furthest behind its share: after any number of rows no task is a
whole row ahead, and with up to three tasks none is a whole row behind.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qd2mora.data.prepare import TaskRows
from qd2mora.data.token_rows import Row, tokens_of
from qd2mora.recipe import Data

_ORDER = 1  # purpose number of this stream of random numbers


@dataclass(frozen=True)
class Share:
    """What a task gets of a stretch of the sequence. `asked` is None where no weights are given."""

    task: str
    rows: int
    tokens: int
    passes: float
    of_rows: float
    of_tokens: float
    asked: float | None


class TaskMix:
    """Endless sequence of training rows; `rows(start, count)` is the same however it is asked for."""

    def __init__(self, data: Data, tasks: list[TaskRows], seed: int) -> None:
        self.tasks = tasks
        self.by_tokens = data.mix == "tokens"
        self.stop = data.stop
        self.weights = [task.task.weight for task in tasks]
        self.seed = seed
        self._tokens = [tokens_of(task.train) for task in tasks]
        self._quotas = [max(1, round(task.task.epochs * len(task.train))) for task in tasks]
        self._starts = np.cumsum([0, *self._quotas])
        self._drawn: list[tuple[int, int]] = []
        self._cost = [0.0] * len(tasks)
        self._count = [0] * len(tasks)
        self._permutations: dict[tuple[int, int], NDArray[np.int64]] = {}

    @property
    def rows_per_epoch(self) -> int:
        """Rows of all files together, each counted `epochs` times."""
        return sum(self._quotas)

    def rows(self, start: int, count: int) -> list[Row]:
        """Return rows number start to start + count of the sequence."""
        return [self.tasks[task].train[place] for task, place in self.places(start, count)]

    def places(self, start: int, count: int) -> list[tuple[int, int]]:
        """Return the tasks, and the places in them, of rows number start to start + count."""
        # All tasks have weights, or none (the recipe is checked).
        if self.weights[0] is None:
            return [self._of_pile(number) for number in range(start, start + count)]
        while len(self._drawn) < start + count:
            self._drawn.append(self._draw())
        return self._drawn[start : start + count]

    def rows_until_stop(self) -> int:
        """Return how many rows it takes until the first or the last task has given all its rows, as `stop` says."""
        assert self.stop is not None
        left, wanted, number = list(self._quotas), 1 if self.stop == "first" else len(self.tasks), 0
        while wanted:
            ((task, _),) = self.places(number, 1)
            number += 1
            left[task] -= 1
            wanted -= left[task] == 0
        return number

    def shares(self, count: int) -> list[Share]:
        """Return what each task gets of the first `count` rows."""
        rows, tokens = np.zeros(len(self.tasks)), np.zeros(len(self.tasks))
        for task, place in self.places(0, count):
            rows[task] += 1
            tokens[task] += self._tokens[task][place]
        return [
            Share(
                task.task.name,
                int(rows[number]),
                int(tokens[number]),
                rows[number] / len(task.train),
                rows[number] / rows.sum(),
                tokens[number] / tokens.sum(),
                weight and weight / math.fsum(each or 0 for each in self.weights),
            )
            for number, (task, weight) in enumerate(zip(self.tasks, self.weights, strict=True))
        ]

    def _of_pile(self, number: int) -> tuple[int, int]:
        epoch, place = divmod(number, self.rows_per_epoch)
        # A pile's rows lie task after task; the permutation is of the whole pile, and tells task and place.
        index = int(self._permutation(-1, epoch, self.rows_per_epoch)[place])
        task = int(np.searchsorted(self._starts, index, side="right")) - 1
        return task, self._repeated(task, epoch, index - int(self._starts[task]))

    def _repeated(self, task: int, epoch: int, index: int) -> int:
        """Return the place of a task's row number `index` of an epoch: whole passes, then a part that changes."""
        size = len(self.tasks[task].train)
        if index < self._quotas[task] // size * size:
            return index % size
        return int(self._permutation(task, epoch, size)[index % size])

    def _draw(self) -> tuple[int, int]:
        # If one more unit were shared out by the weights: next is the task that has least of what it would have then.
        weights = [weight or 0.0 for weight in self.weights]
        each = (sum(self._cost) + 1) / sum(weights)
        behind = [each * weight - cost for weight, cost in zip(weights, self._cost, strict=True)]
        # Of equal ones the first in the recipe, so that the order is no matter of rounding or chance.
        which = behind.index(max(behind))
        size = len(self.tasks[which].train)
        epoch, number = divmod(self._count[which], size)
        place = int(self._permutation(which, epoch, size)[number])
        self._count[which] += 1
        self._cost[which] += int(self._tokens[which][place]) if self.by_tokens else 1
        return which, place

    def _permutation(self, task: int, epoch: int, size: int) -> NDArray[np.int64]:
        key = (task, epoch)
        if key not in self._permutations:
            # Two epochs at most are asked for in turn, where a step crosses from one into the next.
            stale = [other for other in self._permutations if other[0] == task and other[1] < epoch - 1]
            for other in stale:
                del self._permutations[other]
            # One more than the task's number: the pile's is -1, and seeds are not negative.
            self._permutations[key] = np.random.default_rng([self.seed, _ORDER, task + 1, epoch]).permutation(size)
        return self._permutations[key]


def share_lines(shares: list[Share], by_tokens: bool) -> Iterator[str]:
    """Yield a line for each task."""
    for share in shares:
        unit, got = "rows", share.of_rows
        if by_tokens:
            unit, got = "tokens", share.of_tokens
        line = f"task {share.task}: {got:.1%} of {unit}"
        if share.asked is not None:
            line += f", asked {share.asked:.1%} of {unit}"
        yield f"{line}; {share.rows} rows, {share.tokens} tokens, {share.passes:.2f} passes"


__all__ = ["Share", "TaskMix", "share_lines"]
