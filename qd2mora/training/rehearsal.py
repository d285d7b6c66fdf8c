"""The worst of a run before its first step: what does not fit is found in its first minute, not in its fifth hour.

The longest micro batch of all steps runs forward and backward beside whole gradients and stand-ins for the optimiser's
moments, the longest held-out batch is evaluated, and a checkpoint's room on the disk is taken and given back. Where
memory runs out, micro batches are halved as in a step. Nothing is left of it: gradients are dropped, random numbers are
set back, and the optimiser, the progress and the rows' order are not touched, so the adapter is bit for bit that of a
run without.
"""

import time
from collections.abc import Sequence

import torch

from qd2mora.base.host_memory import available_bytes
from qd2mora.data import MULTIPLE, MicroBatch, Row, lengths_of, lines_together
from qd2mora.memory.faults import tried
from qd2mora.memory.plan import Plan
from qd2mora.mixture import routing_of
from qd2mora.recipe import Recipe
from qd2mora.training.disk import as_trouble, checkpoint_bytes, take_and_give_back
from qd2mora.training.loop import Training
from qd2mora.training.randomness import key_of

MOST_ROWS = 200_000
"""Rows that are looked through for the longest micro batch, from the step on that comes next."""
PACKED_STEPS = 8
"""Steps whose lines are packed to see which is longest: those of the most tokens."""
Part = tuple[list[int], tuple[int, ...]]


def is_worthwhile(recipe: Recipe, planned: Plan) -> bool:
    """Tell whether to rehearse; `auto` does where the plan takes more than half of the budget, or of what is free.

    Ask before the base is loaded: what is free then is what the plan is for.
    """
    if recipe.memory.rehearsal != "auto":
        return recipe.memory.rehearsal == "on"
    there = available_bytes() if planned.budget_bytes is None else planned.budget_bytes
    return there is None or 2 * planned.peak_bytes > there


def rehearse(training: Training, planned: Plan, optimizer: str) -> None:
    """Run the worst through; leave the micro batch as small as it must be. Raises WillNotFit, DiskTrouble."""
    began, processes, folder = time.monotonic(), training.processes, training.saver.folder
    size = checkpoint_bytes(planned.trainable_parameters, optimizer)

    def take_room() -> None:
        with as_trouble("a checkpoint, rehearsed,", folder):
            take_and_give_back(folder, size)

    processes.from_main(take_room)
    moments = _moments_to_come(training, planned, optimizer)
    while True:
        step, evaluation = longest_of_steps(training), longest_held_out(training)
        (short,) = processes.sum_numbers([float(_runs_out(training, step, evaluation, moments))])
        if not short:
            break
        training.halve_micro_batch()
    shapes = [f"training {_told(step)}", *([f"evaluation {_told(evaluation)}"] if evaluation else [])]
    training.journal.say(
        f"rehearsed: {', '.join(shapes)} tokens, a checkpoint of {size / 2**20:,.0f} MiB, in "
        f"{time.monotonic() - began:.1f} s; peak so far {processes.peak_bytes() / 2**30:.2f} GiB"
    )


def _moments_to_come(training: Training, planned: Plan, optimizer: str) -> int:
    """Return the bytes of moments that the device will hold; after a resume they are there.

    Paged ones leave when memory is short, and those that an engine shares out are in its hands.
    """
    if optimizer == "paged_adamw_8bit" or not _is_plain(training) or training.optimizer.state:
        return 0
    return planned.items.get("optimizer state", 0)


def _is_plain(training: Training) -> bool:
    return isinstance(training.optimizer, torch.optim.Optimizer)


def longest_of_steps(training: Training) -> MicroBatch:
    """Return the micro batch of the most positions, padding included, among the steps to come."""
    mixture, each, seed = training.mixture, training.train.global_batch, training.train.seed
    lengths_by_task = [task.lengths for task in training.tasks]
    last = min(training.total_steps, training.progress.step + max(1, MOST_ROWS // each))
    steps: Sequence[int] = range(training.progress.step, max(last, training.progress.step + 1))

    def lengths_at(step: int) -> list[int]:
        return [int(lengths_by_task[task][place]) for task, place in mixture.places(step * each, each)]

    if training.capacity is not None:
        steps = sorted(steps, key=lambda step: -sum(lengths_at(step)))[:PACKED_STEPS]
    found = ((_longest(lengths_at(step), training.micro_batch, training.capacity), step) for step in steps)
    (_, part), step = max(found, key=lambda one: one[0][0])
    return _made(mixture.rows(step * each, each), part, seed, step * each)


def longest_held_out(training: Training) -> MicroBatch | None:
    """Return the micro batch of the most positions that an evaluation has; None without held-out rows."""
    asked = [task.validation for task in training.tasks if task.validation]
    if not asked:
        return None
    found = [(_longest(lengths_of(rows).tolist(), training.micro_batch, None), rows) for rows in asked]
    (_, part), rows = max(found, key=lambda one: one[0][0])
    return _made(rows, part, training.train.seed, 0)


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


def _made(rows: Sequence[Row], part: Part, seed: int, first: int) -> MicroBatch:
    numbers, packs = part
    keys = tuple(key_of(seed, "row", first + number) for number in numbers)
    return MicroBatch([rows[number] for number in numbers], keys, packs)


def _runs_out(training: Training, step: MicroBatch, evaluation: MicroBatch | None, moments: int) -> bool:
    _, is_short = tried(lambda: _run(training, step, evaluation, moments))
    training.model.train()
    training.abandon() if is_short else training.let_go()
    return is_short


def _run(training: Training, step: MicroBatch, evaluation: MicroBatch | None, moments: int) -> None:
    """Do a step's work and an evaluation's beside what will be alive then, and forget it."""
    device, routing = training.processes.device, routing_of(training.model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        held = torch.empty(moments, dtype=torch.uint8, device=device)
        if _is_plain(training):
            for parameter in training.parameters.values():
                parameter.grad = torch.zeros_like(parameter)
        try:
            training.tell_routers(step)
            training.backward(step, 1 / step.num_labels)
            if evaluation is not None:
                training.model.eval()
                training.tell_routers(evaluation)
                with torch.no_grad():
                    training.row_losses(evaluation).sum().item()
        finally:
            del held
            if routing is not None:
                routing.forget()


def _told(part: MicroBatch) -> str:
    lines, width = _shape([len(row.ids) for row in part.rows], (list(range(len(part.rows))), part.packs))
    return f"{lines} x {width}"


__all__ = ["is_worthwhile", "longest_held_out", "longest_of_steps", "rehearse"]
