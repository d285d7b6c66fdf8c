"""How long a run may take: a few of its micro batches on this device, and from them all steps and evaluations.

An estimate: rows are the first of each file, the optimiser's update, saves and answers that are written are not in it.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from qd2mora.base import RANDOM, default_device, load_base
from qd2mora.base.files import local_folder, weight_files
from qd2mora.data import FirstRows, Row, row_count
from qd2mora.memory.plan import Plan
from qd2mora.memory.techniques import prepare_base
from qd2mora.mixture import MixtureConfig, add_adapter, selection_biases
from qd2mora.objectives import objective_of
from qd2mora.objectives.head import add_head
from qd2mora.recipe import Recipe
from qd2mora.recipe.data import HUB
from qd2mora.terminal.pace import in_words
from qd2mora.training.micro_batches import MicroBatches, micro_batch
from qd2mora.training.processes import Processes
from qd2mora.training.progress import Progress
from qd2mora.training.updates import PlainUpdater, build_optimizer

MEASURED = 2
"""Micro batches that are timed, after one that warms up."""
LONGEST_S = 60.0
"""Seconds after which one micro batch has to do."""
LARGEST_PEAK = 8 << 30
"""Of a plan, up to which it is tried out where nobody asks for it."""
LARGEST_BYTES = 2 << 30
"""Of a base's files, up to which it is loaded to be timed where nobody asks for it: beyond, that takes minutes."""


@dataclass(frozen=True)
class Pass:
    """Seconds of a row forward and backward, and forward alone; `number`: the micro batches that were timed."""

    training: float
    forward: float
    number: int
    rows: int
    loading: float


def why_not_timed(recipe: Recipe, planned: Plan, rows: Sequence[Row], *, is_asked: bool) -> str:
    """Say why no time can be measured, or would take long; nothing where it is measured."""
    here = default_device()
    if recipe.base.model.startswith(RANDOM) or local_folder(recipe.base.model) is None:
        return f"'{recipe.base.model}' is not at hand here"
    if ("cpu" == planned.device) != (here.type == "cpu") or "not here" in planned.device:
        return f"{planned.device} is planned for"
    if not rows:
        return "no rows were read"
    if recipe.memory.engine != "none":
        return "an engine shares the work out"
    size = sum(path.stat().st_size for path in weight_files(recipe.base.model))
    if size > LARGEST_BYTES and not is_asked:
        return f"loading {size / 2**30:.1f} GiB takes a while; --time measures all the same"
    # An adapter may be larger than its base, and a step's memory larger than both.
    if planned.peak_bytes > LARGEST_PEAK and not is_asked:
        return f"a step takes {planned.peak_bytes / 2**30:.1f} GiB; --time measures all the same"
    if not planned.fits:
        return "the plan does not fit"
    return ""


def timed(recipe: Recipe, planned: Plan, rows: Sequence[Row], pad: int) -> Pass:
    """Load the base, and time micro batches of these rows, drawn at random, forward and backward, and forward alone."""
    began = time.monotonic()
    batches = _batches(recipe, planned, pad)
    loading = time.monotonic() - began
    # At random, as a step's rows are: files are often sorted, and the first rows of those all short.
    drawn = random.Random(recipe.train.seed).choices(range(len(rows)), k=batches.size * (1 + MEASURED))
    parts = [drawn[start : start + batches.size] for start in range(0, len(drawn), batches.size)]
    training, number = _seconds(batches, rows, parts, is_training=True)
    forward, _ = _seconds(batches, rows, parts, is_training=False)
    return Pass(training / batches.size, forward / batches.size, number, batches.size, loading)


def _batches(recipe: Recipe, planned: Plan, pad: int) -> MicroBatches:
    device = default_device()
    base = load_base(recipe.base.model_copy(update={"cache": "none"}), device, planned.layout.dtype)
    prepare_base(base, planned.layout, device)
    config = MixtureConfig.from_recipe(recipe.adapter, len(recipe.data.tasks))
    model = add_adapter(base, config, recipe.train.seed).train()
    objective = objective_of(recipe.objective)
    if objective.has_head:
        add_head(model, recipe.train.seed, over_tasks=recipe.tasks_over_experts)
    parameters = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    optimizer = build_optimizer(recipe.train, planned.layout.optimizer, parameters)
    return MicroBatches(
        model=model,
        updater=PlainUpdater(parameters, optimizer, selection_biases(model)),
        processes=Processes(0, 1, device),
        progress=Progress(),
        say=lambda line: None,
        size=planned.micro_batch,
        seed=recipe.train.seed,
        pad=pad,
        loss_chunk=planned.layout.loss_chunk,
        objective=objective,
    )


def _seconds(
    batches: MicroBatches, rows: Sequence[Row], parts: list[list[int]], *, is_training: bool
) -> tuple[float, int]:
    """Return the mean seconds of a micro batch, the first left out where others follow, and how many were timed."""
    batches.model.train(is_training)
    seconds: list[float] = []
    for numbers in parts:
        part, began = micro_batch(rows, numbers, (), batches.seed, 0), time.monotonic()
        batches.tell_routers(part)
        with torch.set_grad_enabled(is_training):
            loss = batches.row_losses(part).sum()
            if is_training:
                loss.backward()
        float(loss.detach())  # waits for the device
        seconds.append(time.monotonic() - began)
        if sum(seconds) > LONGEST_S:
            break
    batches.updater.forget_gradients()
    warm = seconds[1:] or seconds
    return sum(warm) / len(warm), len(warm)


def num_steps(recipe: Recipe) -> int | None:
    """Return the updates of a run, counting the rows of its files where epochs are asked for; None: not to be told."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    tasks = recipe.data.tasks
    if recipe.train.epochs is None or any(task.path.startswith(HUB) or task.weight is not None for task in tasks):
        return None
    held_out = sum(task.validation for task in tasks if isinstance(task.validation, int))
    rows = sum(task.epochs * row_count(task, task.path) for task in tasks) - held_out
    return math.ceil(recipe.train.epochs * rows / recipe.train.global_batch)


def held_out_rows(recipe: Recipe) -> int:
    """Return the rows that every evaluation goes over."""
    number = 0
    for task in recipe.data.tasks:
        if isinstance(task.validation, int):
            number += task.validation
        elif not task.validation.startswith(HUB):
            number += row_count(task, task.validation)
    return number


def seconds_of_training(recipe: Recipe, measured: Pass, steps: int) -> float:
    """Return what steps and evaluations take together."""
    # One is before the first step, and the last where the run ends.
    evaluations = 1 + math.ceil(steps / recipe.train.eval_every)
    of_steps = steps * recipe.train.global_batch * measured.training
    return measured.loading + of_steps + evaluations * held_out_rows(recipe) * measured.forward


def outlook(
    recipe: Recipe,
    planned: Plan,
    found: Sequence[FirstRows],
    pad: int,
    say: Callable[[Pass, int | None], str],
    *,
    is_asked: bool = False,
) -> str:
    """Measure, and return what `say` makes of it; or why nothing was measured."""
    rows = list(islice((row for each in found for row in each.rows if row.num_labels), 2000))
    why = why_not_timed(recipe, planned, rows, is_asked=is_asked)
    if why:
        return f"time: not estimated, as {why}"
    measured = timed(recipe, planned, rows, pad)
    label = f"estimated from {measured.number} micro batches of {measured.rows} rows"
    return f"time: {say(measured, num_steps(recipe))} ({label}; without saves and without answers that are written)"


def of_training(recipe: Recipe) -> Callable[[Pass, int | None], str]:
    """Return what words the time of one training."""

    def say(measured: Pass, steps: int | None) -> str:
        step = recipe.train.global_batch * measured.training
        if steps is None:
            return f"{step:.2g} s a step; how many there are follows from data that was not counted"
        whole = in_words(seconds_of_training(recipe, measured, steps))
        rows = held_out_rows(recipe)
        evaluation = f", evaluations of {rows} rows in {in_words(rows * measured.forward)}" if rows else ""
        return f"about {whole}: {steps:,} steps of {step:.2g} s{evaluation}"

    return say


__all__ = ["Pass", "num_steps", "of_training", "outlook", "seconds_of_training", "timed", "why_not_timed"]
