"""Rows through the adapted model, a micro batch at a time, in ones as small as memory asks for.

Which rows a step has is a function of the recipe, the seed and the step's number; which numbers are drawn for a row, of
the seed and the row's place in the endless sequence. So a step that is done again, on another split into micro batches
or after a resume, is the same step, and there is nothing to save of either.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor

from qd2mora.base.device import has_flash_attention
from qd2mora.base.passes import label_places, output_head
from qd2mora.data import MicroBatch, Row, TaskMix, TaskRows, dealt, lines_together
from qd2mora.errors import WillNotFit
from qd2mora.memory.faults import tried
from qd2mora.memory.loss import RowLoss
from qd2mora.memory.pinned import pinned
from qd2mora.mixture import routing_of
from qd2mora.objectives import Objective, Reference, Said, mismatched
from qd2mora.objectives.head import RowScore
from qd2mora.objectives.objective import divergence
from qd2mora.training.processes import Processes
from qd2mora.training.progress import Progress
from qd2mora.training.updates import Updater

T = TypeVar("T")
Purpose = Literal["step", "row", "answer"]


def key_of(seed: int, purpose: Purpose, *place: int) -> int:
    """Return a non-negative key below 2**63 for random numbers: a hash of the seed, what for, and a place in the run.

    A place is an update and a process, or a row's number in the endless sequence of rows.
    """
    # A hash that is the same in every process and version, as Python's own is not; one bit less, for int64.
    text = f"{seed} {purpose} {' '.join(map(str, place))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass
class Course:
    """Which rows every step of a run has. `waiting`: numbers of tasks whose rows are passed over."""

    mixture: TaskMix
    tasks: list[TaskRows]
    rows_a_step: int
    total_steps: int
    capacity: int | None
    """Tokens that rows of a step may share a line of; None: each row has its own."""
    waiting: frozenset[int] = frozenset()
    _learned: list[tuple[int, int]] = field(default_factory=list)
    _passed: int = 0
    """Where some tasks wait: the places of the others' rows, and how many rows were looked at for them."""

    def first_of(self, step: int) -> int:
        """Return the number of a step's first row."""
        return step * self.rows_a_step

    def rows(self, step: int) -> list[Row]:
        """Return the rows of a step, of all processes."""
        if self.waiting:
            return [self.tasks[task].train[place] for task, place in self._places(step)]
        return self.mixture.rows(self.first_of(step), self.rows_a_step)

    def lengths(self, step: int) -> list[int]:
        """Return the tokens of each row of a step, without making rows of what is stored."""
        return [int(self._lengths[task][place]) for task, place in self._places(step)]

    def _places(self, step: int) -> list[tuple[int, int]]:
        first, last = self.first_of(step), self.first_of(step + 1)
        if not self.waiting:
            return list(self.mixture.places(first, self.rows_a_step))
        while len(self._learned) < last:
            found = self.mixture.places(self._passed, self.rows_a_step)
            self._passed += self.rows_a_step
            self._learned += [place for place in found if place[0] not in self.waiting]
        return self._learned[first:last]

    @property
    def num_lines(self) -> int:
        """At most how many different lines the run meets."""
        rows = min(self.total_steps * self.rows_a_step, sum(len(task.train) for task in self.tasks))
        return 2 * (rows + sum(len(task.validation) for task in self.tasks))

    @cached_property
    def _lengths(self) -> list[NDArray[np.int32]]:
        return [task.lengths for task in self.tasks]


@dataclass
class MicroBatches:
    """Runs rows of this process through the model; `size` are the rows, or packed lines, of one forward pass."""

    model: PeftModel
    updater: Updater
    processes: Processes
    progress: Progress
    say: Callable[[str], None]
    size: int
    seed: int
    pad: int
    loss_chunk: int
    objective: Objective
    reference: Reference | None = None
    """The frozen model that the objective measures against."""
    rows_by_layer: int = 0
    """Rows, or packed lines, of the micro batches that take turns in each layer; 0: one after the other."""

    def __post_init__(self) -> None:
        self.row_loss: RowLoss | RowScore = RowLoss(self.model, self.loss_chunk)
        if self.objective.has_head:
            self.row_loss = RowScore(self.model)
        self.routing = routing_of(self.model)
        """None where the adapter has no routers of ours."""

    @cached_property
    def drops_mask(self) -> bool:
        """Whether attention is quicker without a mask, which rows padded on the right do not need."""
        head: Any = output_head(self.model).linear
        return has_flash_attention(self.processes.device, head.weight.dtype)

    def of(self, rows: Sequence[Row], first: int, capacity: int | None = None) -> Iterator[MicroBatch]:
        """Yield this process's micro batches, lines of like length together; keys number the rows from `first` on.

        A line is a row, or with `capacity` what fits that many tokens. Whole ones are dealt out: routers see the same.
        """
        whole = lines_together([row.width for row in rows], self.size, capacity)
        for (numbers, packs), weight in dealt(
            whole, self.processes.index, self.processes.count, self.updater.shares_weights
        ):
            yield micro_batch(rows, numbers, packs, self.seed, first, weight)

    def in_groups(self, parts: Iterable[MicroBatch]) -> Iterator[list[MicroBatch]]:
        """Yield micro batches in groups that take turns in each layer."""
        rest = iter(parts)
        while group := list(islice(rest, max(1, self.rows_by_layer // self.size))):
            yield group

    def tell_routers(self, part: MicroBatch) -> None:
        """Say which rows run: chance in the adapters is a function of their keys, whatever the split."""
        if self.routing is not None:
            self.routing.rows, self.routing.lengths = part.keys, tuple(len(row.ids) for row in part.rows)
            self.routing.places, self.routing.is_counted = part.places, part.weight > 0

    def forget_rows(self) -> None:
        """Tell the routers of no rows: what runs next is not of ours."""
        if self.routing is not None:
            self.routing.rows = self.routing.lengths = self.routing.places = None

    def collated(self, part: MicroBatch) -> dict[str, Tensor]:
        """Return a micro batch's tensors on the device, which the host does not wait for."""
        batch, device = part.collated(self.pad), self.processes.device
        batch["label_places"] = label_places(batch)
        if device.type != "cuda":
            return batch
        if "attention_mask" in batch and self.drops_mask:
            # Rows are padded on the right, and no token looks there: without a mask attention may take its fastest
            # kernel, and keeps less. Routers still have to know which tokens are real.
            batch["attended"] = batch.pop("attention_mask").bool()
        return {name: pinned(tensor).to(device, non_blocking=True) for name, tensor in batch.items()}

    def computing(self) -> torch.autocast:
        """Return the context that products of a pass run in."""
        # Only float16 runs have a scale, and they alone need autocast: bases in other dtypes compute in their own.
        is_scaled = self.progress.loss_scale is not None
        return torch.autocast(self.processes.device.type, torch.float16, enabled=is_scaled)

    def row_losses(self, part: MicroBatch) -> Tensor:
        """Return the summed loss of each line in nats, or its score where there is a head, (lines,) float32."""
        with self.computing():
            losses: Tensor = self.row_loss(self.collated(part))
        return losses

    def said(self, part: MicroBatch, baseline: float = 0.0) -> Said:
        """Return what the objective judges of a micro batch; `baseline` is its step's."""
        reference = None
        if self.objective.has_reference:
            # First: what the pass that is learned from leaves for its way back is not to be touched.
            assert self.reference is not None
            reference = self.reference.losses(part.rows, lambda: self.row_losses(part))
        if self.objective.has_divergence:
            return self._said_by_token(part)
        return Said(self.row_losses(part), part.rows, reference, baseline)

    def _said_by_token(self, part: MicroBatch) -> Said:
        """Return each line's loss and how far its tokens are from the reference, which is asked first, live."""
        assert self.reference is not None and isinstance(self.row_loss, RowLoss)
        batch = self.collated(part)
        with self.computing():
            with self.reference.speaking():
                of_reference, *_ = self.row_loss.by_token(batch)
            losses, row_of_token, num_rows = self.row_loss.by_token(batch)
        by_line = losses.new_zeros(2, num_rows).index_add(
            1, row_of_token, torch.stack([losses, divergence(losses, of_reference)])
        )
        return Said(by_line[0], part.rows, divergence=by_line[1])

    def baseline(self, rows: Sequence[Row], goes_on: Callable[[], bool], doing: str = "") -> float:
        """Return what the objective takes of all rows of a step, or of an evaluation.

        `goes_on` is asked after each micro batch; False ends the pass, of whose result nothing is made then. Raises
        WillNotFit.
        """
        if not self.objective.has_baseline or len(rows) < 2:
            return 0.0
        others = mismatched(list(rows), max(row.width for row in rows))
        is_training = self.model.training
        self.model.eval()
        sums = self.until_it_fits(lambda: self._log_ratios(others, goes_on), doing)
        self.model.train(is_training)
        total, number = self.processes.sum_numbers(sums)
        return max(0.0, total / number)

    @torch.no_grad()
    def _log_ratios(self, rows: list[Row], goes_on: Callable[[], bool]) -> list[float]:
        """Return the summed log-ratios of this process's rows, and how many they are."""
        sums = torch.zeros(2, dtype=torch.float64)
        for part in self.of(rows, 0):
            self.tell_routers(part)
            ratios = self.said(part).log_ratios.double().cpu()
            sums += part.weight * torch.stack([ratios.sum(), torch.tensor(float(len(ratios)), dtype=torch.float64)])
            if not goes_on():
                break
        return sums.tolist()

    def attempt(self, act: Callable[[], T]) -> T | None:
        """Return what `act` does, None where memory ran out on the way, of which nothing is left then.

        Raises WillNotFit where other processes cannot do theirs again.
        """
        result, is_short = tried(act)
        if is_short:
            self.updater.refuse_again()
            self.let_go()
        return result

    def until_it_fits(self, act: Callable[[], T], doing: str = "") -> T:
        """Do something on smaller and smaller micro batches until it fits every process. Raises WillNotFit."""
        while True:
            result = self.attempt(act)
            (short,) = self.processes.sum_numbers([float(result is None)])
            if result is not None and not short:
                return result
            self.halve(doing, is_step=not doing)

    def let_go(self) -> None:
        """Drop what a try has left on the device."""
        self.updater.forget_gradients()
        if self.processes.device.type == "cuda":
            torch.cuda.empty_cache()

    def halve(self, doing: str = "", *, is_step: bool = True) -> None:
        """Go on with less at once, and say so. Raises WillNotFit where there is no less, for what was done.

        Where micro batches of a step take turns in each layer, fewer of them do at first.
        """
        self.updater.forget_gradients()
        when = f"out of memory: from step {self.progress.step + 1} on"
        if is_step and self.rows_by_layer > self.size:
            number = self.rows_by_layer // self.size // 2
            self.rows_by_layer = self.progress.rows_by_layer = number * self.size if number > 1 else 0
            self.say(f"{when} {number} micro batches of {self.size} at a time in each layer")
            return
        if self.size == 1:
            doing = doing or f"step {self.progress.step + 1}"
            raise WillNotFit(
                f"memory: {doing} does not fit the device with one row at a time; lower "
                "data.max_length, or see `qd2mora plan` for what takes the memory"
            )
        # In the progress too, so that a resume does not run out of memory once more.
        self.size = self.progress.micro_batch = self.size // 2
        self.say(f"{when} micro batches of {self.size}")


def micro_batch(
    rows: Sequence[Row], numbers: list[int], packs: tuple[int, ...], seed: int, first: int, weight: float = 1.0
) -> MicroBatch:
    """Return those `numbers` of the rows that run together, a key for each line; `first` numbers the first of all."""
    lines = [(line, number, place) for number in numbers for place, line in enumerate(rows[number].lines)]
    # A row of one line has the key that it had before there were others.
    keys = tuple(key_of(seed, "row", first + number, *([place] if place else [])) for _, number, place in lines)
    return MicroBatch([line for line, _, _ in lines], keys, packs, weight)


__all__ = ["Course", "MicroBatches", "Purpose", "key_of", "micro_batch"]
