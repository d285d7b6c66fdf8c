"""The worst of a run before its first step: what does not fit is found in its first minute, not in its fifth hour.

The longest micro batch of all steps, or as many such as take turns in each layer, runs forward and backward beside
whole gradients and stand-ins for the optimiser's moments, the longest held-out batch is evaluated, and a checkpoint's
room on the disk is taken and given back. Where memory runs out, less runs at once, as in a step. Nothing is left of it:
gradients are dropped, random numbers are set back, and the optimiser, the progress and the rows' order are not touched,
so the adapter is bit for bit that of a run without.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qd2mora.data import MULTIPLE, MicroBatch, lengths_of, lines_together
from qd2mora.data.pack import Part
from qd2mora.memory.plan import Plan
from qd2mora.recipe import Recipe
from qd2mora.recipe.optimizers import OPTIMIZERS
from qd2mora.training.disk_space import as_trouble, checkpoint_bytes, take_and_give_back
from qd2mora.training.gradient import StepGradient
from qd2mora.training.micro_batches import micro_batch

MOST_ROWS = 200_000
"""Rows that are looked through for the longest micro batch, from the step on that comes next."""
PACKED_STEPS = 8
"""Steps whose lines are packed to see which is longest: those of the most tokens."""


def is_worthwhile(recipe: Recipe, planned: Plan) -> bool:
    """Tell whether to rehearse; `auto` does where the plan takes more than half of the budget, or of what is free.

    Ask before the base is loaded: what is free then is what the plan is for.
    """
    if recipe.memory.rehearsal != "auto":
        return recipe.memory.rehearsal == "on"
    there = planned.budget_bytes
    return there is None or 2 * planned.peak_bytes > there


@dataclass(frozen=True)
class Rehearsal:
    """What runs before the first step, on the model and the rows of the run; `checkpoints` is where saves go."""

    gradient: StepGradient
    planned: Plan
    checkpoints: Path

    def run(self) -> None:
        """Run the worst through; leave the micro batch as small as it must be. Raises WillNotFit, DiskTrouble."""
        began, batches = time.monotonic(), self.gradient.batches
        processes, size = batches.processes, checkpoint_bytes(self.planned)

        def take_room() -> None:
            with as_trouble("a checkpoint, rehearsed,", self.checkpoints):
                take_and_give_back(self.checkpoints, size)

        processes.from_main(take_room)
        moments = self._moments_to_come()
        step, evaluation = batches.until_it_fits(lambda: self._run_longest(moments))
        shapes = f"training {_shape_text(step)}"
        if evaluation is not None:
            shapes += f", evaluation {_shape_text(evaluation)}"
        batches.say(
            f"rehearsed: {shapes} tokens, a checkpoint of {size / 2**20:,.0f} MiB, in "
            f"{time.monotonic() - began:.1f} s; peak so far {processes.peak_bytes() / 2**30:.2f} GiB"
        )

    def longest_of_steps(self) -> MicroBatch:
        """Return the micro batch of the most positions, padding included, among the steps to come."""
        course, batches = self.gradient.course, self.gradient.batches
        first = batches.progress.step
        last = min(course.total_steps, first + max(1, MOST_ROWS // course.rows_a_step))
        steps: Sequence[int] = range(first, max(last, first + 1))
        if course.capacity is not None:
            # Packing is a search; the longest lines are looked for where most tokens have to go.
            steps = sorted(steps, key=lambda step: -sum(course.lengths(step)))[:PACKED_STEPS]
        found = ((_longest(course.lengths(step), batches.size, course.capacity), step) for step in steps)
        (_, (numbers, packs)), step = max(found, key=lambda one: one[0][0])
        rows = course.rows(step)
        if self.gradient.rollouts is not None:
            rows = [self.gradient.rollouts.as_long(row) for row in rows]
        return micro_batch(rows, numbers, packs, batches.seed, course.first_of(step))

    def longest_held_out(self) -> MicroBatch | None:
        """Return the micro batch of the most positions that an evaluation has; None without held-out rows."""
        batches = self.gradient.batches
        asked = [task.validation for task in self.gradient.course.tasks if task.validation]
        if not asked:
            return None
        found = [(_longest(lengths_of(rows).tolist(), batches.size, None), rows) for rows in asked]
        (_, (numbers, packs)), rows = max(found, key=lambda one: one[0][0])
        return micro_batch(rows, numbers, packs, batches.seed, 0)

    def _group_of(self, longest: MicroBatch) -> list[MicroBatch]:
        """Return as many such micro batches as take turns in each layer, at most as many as a step has here."""
        batches = self.gradient.batches
        number = -(-self.gradient.course.rows_a_step // (batches.size * batches.processes.count))
        return next(batches.in_groups([longest] * max(1, number)))

    def _moments_to_come(self) -> int:
        """Return the bytes of moments that the device will hold; after a resume they are there.

        Paged ones leave when memory is short, and those that an engine shares out are in its hands.
        """
        updater = self.gradient.batches.updater
        is_paged = OPTIMIZERS[self.planned.layout.optimizer].is_paged
        if is_paged or updater.shares_moments or updater.has_moments:
            return 0
        return self.planned.items.get("optimizer state", 0)

    def _run_longest(self, moments: int) -> tuple[MicroBatch, MicroBatch | None]:
        """Do a step's work and an evaluation's beside what will be alive then, and forget it; return which they are."""
        batches, step, evaluation = self.gradient.batches, self.longest_of_steps(), self.longest_held_out()
        device, devices = batches.processes.device, []
        if device.type == "cuda":
            devices = [device]
        # Put back afterwards, so that a run with a rehearsal draws what a run without one does.
        with torch.random.fork_rng(devices):
            # Stand-ins: the optimiser makes its moments at the first update, which is after the first peak.
            held = torch.empty(moments, dtype=torch.uint8, device=device)
            # Gradients of a step add up in whole tensors beside the micro batch: they are there before its pass.
            if not batches.updater.shares_moments:
                for parameter in batches.updater.parameters.values():
                    parameter.grad = torch.zeros_like(parameter)
            try:
                for _ in self.gradient.backward_by_layer(self._group_of(step), 1 / step.num_labels):
                    pass  # the share is any number: nothing is kept of it
                if evaluation is not None:
                    batches.model.eval()
                    batches.tell_routers(evaluation)
                    with torch.no_grad():
                        batches.row_losses(evaluation).sum().item()
            finally:
                del held
                batches.model.train()
                if batches.routing is not None:
                    batches.routing.forget()
        batches.let_go()
        return step, evaluation


def _longest(lengths: Sequence[int], at_once: int, capacity: int | None) -> tuple[int, Part]:
    """Return the most positions of a micro batch of these rows, and which it is."""
    parts = lines_together(lengths, at_once, capacity)
    sizes = [lines * width for lines, width in (_shape(lengths, part) for part in parts)]
    return max(sizes), parts[sizes.index(max(sizes))]


def _shape(lengths: Sequence[int], part: Part) -> tuple[int, int]:
    """Return the lines of a micro batch, and their width, rounded up as a batch's is."""
    numbers, packs = part
    rest = iter(numbers)
    lines = [sum(lengths[next(rest)] for _ in range(count)) for count in packs or [1] * len(numbers)]
    return len(lines), -(-max(lines) // MULTIPLE) * MULTIPLE


def _shape_text(part: MicroBatch) -> str:
    lines, width = _shape([len(row.ids) for row in part.rows], (list(range(len(part.rows))), part.packs))
    return f"{lines} x {width}"


__all__ = ["Rehearsal", "is_worthwhile"]
