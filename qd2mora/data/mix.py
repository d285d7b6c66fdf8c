"""The order of rows, a pure function of the seed: nothing to save, nothing to restore.

Without weights the tasks are one pile, shuffled anew each epoch. With weights each task has its own endless shuffled
stream, and the next row comes from the task that is furthest behind its share: after any number of rows no task is a
whole row ahead, and with up to three tasks none is a whole row behind.
"""

import numpy as np
from numpy.typing import NDArray

from qd2mora.data.prepare import Row, TaskRows
from qd2mora.recipe import Data

_ORDER = 1  # purpose number of this stream of random numbers


class Mixture:
    """Endless sequence of training rows; `rows(start, count)` is the same however it is asked for."""

    def __init__(self, data: Data, tasks: list[TaskRows], seed: int) -> None:
        self.tasks = tasks
        self.by_tokens = data.mix == "tokens"
        self.weights = [task.task.weight for task in tasks]
        self.seed = seed
        self._drawn: list[Row] = []
        self._cost = np.zeros(len(tasks))
        self._count = [0] * len(tasks)
        self._permutations: dict[tuple[int, int], NDArray[np.int64]] = {}

    @property
    def rows_per_epoch(self) -> int:
        """Rows in all files together."""
        return sum(len(task.train) for task in self.tasks)

    def rows(self, start: int, count: int) -> list[Row]:
        """Return rows number start to start + count of the sequence."""
        if self.weights[0] is None:
            return [self._of_pile(number) for number in range(start, start + count)]
        while len(self._drawn) < start + count:
            self._drawn.append(self._draw())
        return self._drawn[start : start + count]

    def _of_pile(self, number: int) -> Row:
        epoch, place = divmod(number, self.rows_per_epoch)
        index = int(self._permutation(-1, epoch, self.rows_per_epoch)[place])
        for task in self.tasks:
            if index < len(task.train):
                return task.train[index]
            index -= len(task.train)
        raise AssertionError("a permutation stays within the pile")

    def _draw(self) -> Row:
        weights = np.asarray(self.weights, dtype=np.float64)
        which = int(np.argmax((self._cost.sum() + 1) * weights / weights.sum() - self._cost))
        rows = self.tasks[which].train
        epoch, place = divmod(self._count[which], len(rows))
        row = rows[int(self._permutation(which, epoch, len(rows))[place])]
        self._count[which] += 1
        self._cost[which] += len(row.ids) if self.by_tokens else 1
        return row

    def _permutation(self, task: int, epoch: int, size: int) -> NDArray[np.int64]:
        key = (task, epoch)
        if key not in self._permutations:
            stale = [other for other in self._permutations if other[0] == task and other[1] < epoch - 1]
            for other in stale:
                del self._permutations[other]
            self._permutations[key] = np.random.default_rng([self.seed, _ORDER, task + 1, epoch]).permutation(size)
        return self._permutations[key]


__all__ = ["Mixture"]
