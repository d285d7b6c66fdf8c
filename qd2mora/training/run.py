"""A run, stage by stage: what it reads, what it is made of, its steps, what it leaves."""

import contextlib
import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from qd2mora.adapter_folder import base_identity
from qd2mora.base import base_config, compute_dtype, fingerprint, load_base, load_tokenizer
from qd2mora.data import TaskMix, collate, prepare
from qd2mora.disk.file_hash import hash_of_file
from qd2mora.disk.lock import locked
from qd2mora.memory.engine import check_engine, refuse_storage
from qd2mora.memory.faults import as_lost
from qd2mora.memory.loss import check_isolation
from qd2mora.memory.techniques import prepare_base
from qd2mora.mixture import MixtureConfig, adapter_tensors, add_adapter, selection_biases
from qd2mora.mixture.start_folder import start_folder
from qd2mora.objectives import objective_of
from qd2mora.objectives.head import add_head
from qd2mora.objectives.rules import rule_of
from qd2mora.recipe import Recipe, Train
from qd2mora.run_folder import RunFolder, clock_of
from qd2mora.safekeeping.inventory import seal_run
from qd2mora.stopping import listening
from qd2mora.training.adapter_start import start_adapter
from qd2mora.training.assembly import Inputs, Start, keep_reference_of, micro_batches_of, training_of
from qd2mora.training.clock import TimeLimit
from qd2mora.training.disk_space import bytes_to_write, refuse_full
from qd2mora.training.fitting import fitting_plan
from qd2mora.training.identity import Ancestry, Manifest, identity_of_inputs, identity_of_start
from qd2mora.training.journal import Journal, StepDisplay
from qd2mora.training.kept_reference import reference_of
from qd2mora.training.launch import launched
from qd2mora.training.machine import device_name, repeatable, take_machine
from qd2mora.training.micro_batches import Course
from qd2mora.training.opening import check_folder, open_folder, read_manifest, restore
from qd2mora.training.processes import Processes
from qd2mora.training.progress import Progress
from qd2mora.training.recipe_checks import (
    check_judging,
    check_limits,
    check_packing,
    check_prompts,
    check_routing,
    check_rows,
    check_spans,
    check_stages,
    check_tasks,
    tasks_to_score,
)
from qd2mora.training.rehearsal import Rehearsal, is_worthwhile
from qd2mora.training.result import save_result
from qd2mora.training.stages import Stages
from qd2mora.training.start_words import say_what_starts
from qd2mora.training.updates import PlainUpdater, Updater, build_optimizer, by_rate
from qd2mora.training.zero import ZeroUpdater

# As torch's GradScaler begins; what is too large is halved before anything is lost.
FIRST_LOSS_SCALE = 2.0**16
WORTH_KEEPING = 512 << 20
"""Bytes of 4-bit weights from which on they are kept where the recipe leaves that open: fewer are made in seconds."""


@dataclass(frozen=True)
class Trained:
    """What a run ended with."""

    folder: Path
    steps: int
    eval_loss: dict[str, float]
    bad_steps: int
    is_main: bool = True


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_changed: Collection[str] = (),
    reward_file: Path | None = None,
) -> Trained:
    """Plan, then train; write the run folder `recipe.output`.

    Everything that can be refused is refused before the folder is touched. `resume` continues from the newest whole
    checkpoint and ends with the same bytes as a run that was never broken; it is refused where a field of the run's
    identity changed, unless `allow_changed` names it. `overwrite` replaces a run. `reward_file`: of `grpo` with
    `rule: file`, Python that says what an answer is worth.

    Raises InputRefused, WillNotFit, DeviceLost, NotFinite, DiskTrouble, DamagedFile, SignalStop.
    """
    folder, recipe = RunFolder(Path(recipe.output)), _checked(recipe)
    rule = rule_of(recipe.objective, reward_file)
    with listening() as stop, as_lost(), contextlib.ExitStack() as held:
        accelerator = launched(recipe, folder)
        processes = Processes.of(accelerator)

        def take_folder() -> None:
            check_folder(folder, resume, overwrite)
            held.enter_context(locked(folder.lock))
            check_folder(folder, resume, overwrite)  # what was true before the lock need not be

        processes.from_main(take_folder)
        time_limit = TimeLimit(recipe.train)
        before = None
        if resume:
            before = processes.from_main(lambda: read_manifest(folder))
        start = Start(
            recipe, folder, accelerator, processes, stop, time_limit, before, allow_changed, reward_file, rule
        )
        # A resume computes with the threads that its run began with; whoever called gets back their own.
        held.enter_context(repeatable(processes.device, recipe.train.deterministic))
        return _train_locked(start)


def _checked(recipe: Recipe) -> Recipe:
    """Return a recipe whose adapter is settled, of which all that it says itself is checked. Raises InputRefused."""
    config = MixtureConfig.from_recipe(recipe.adapter, len(recipe.data.tasks))
    if recipe.adapter.start is not None:
        recipe = recipe.model_copy(update={"adapter": config.as_section(recipe.adapter)})
    check_stages(config, recipe)
    check_tasks(config, recipe)
    check_routing(config, recipe.train)
    if recipe.data.packing:
        check_packing(config)
    check_engine(recipe, config)
    return recipe


def _train_locked(start: Start) -> Trained:
    """Train in a folder that is this run's alone."""
    folder, processes = start.folder, start.processes
    of_machine = take_machine(start.before, processes.device, start.allow_changed)
    inputs = _read_inputs(start)
    is_rehearsed = processes.from_main(lambda: is_worthwhile(inputs.recipe, inputs.planned))
    processes.from_main(lambda: refuse_full(folder.path, bytes_to_write(inputs.recipe, inputs.planned)))
    ancestry = _identified(start, inputs)
    course = _course(inputs)
    stages = Stages.of(inputs.recipe, course.total_steps)
    model, frozen = _started_model(start, inputs, course.mixture)
    ancestry.add({"base": fingerprint(inputs.recipe.base)})  # after the load, which fetches what is not here yet
    ancestry.add(identity_of_start(inputs.recipe))
    if start.reward_file is not None:
        ancestry.add({"objective.reward_file": hash_of_file(start.reward_file)})
    # What is computed of weights or rows may differ in a last bit on another GPU.
    processes.copy_from_main(adapter_tensors(model))
    reference = reference_of(inputs.recipe, model)
    updater = _updater(start, inputs, model, frozen)
    adapter = inputs.recipe.adapter
    stages.refuse_idle(updater.parameters, bool(adapter.start or adapter.adapters))
    progress, problems = _restored(start, updater)
    _open(start, inputs, ancestry, progress)
    mark = base_identity(inputs.recipe.base, str(ancestry.identity["base"]))
    journal = Journal(folder.metrics, start.accelerator, StepDisplay(course.total_steps, progress.step))
    batches = micro_batches_of(inputs, model, updater, processes, progress, journal)
    batches.reference = reference
    training = training_of(start, inputs, course, batches, journal, mark)
    for line in (*(f"passed over: {problem}" for problem in problems), *of_machine):
        journal.say(line)
    say_what_starts(training, inputs.planned, inputs.tokenizer)
    keep_reference_of(inputs, ancestry, training)
    with start.stop.deferred(), journal.display:
        if is_rehearsed and progress.step < course.total_steps:
            Rehearsal(training.gradient, inputs.planned, folder.checkpoints).run()
        losses = training.run()
        processes.from_main(lambda: save_result(folder, training, inputs.tokenizer, mark))
        processes.from_main(lambda: seal_run(folder.path))
    start.accelerator.end_training()
    return Trained(folder.path, progress.step, losses, progress.bad_steps, processes.is_main)


def _read_inputs(start: Start) -> Inputs:
    """Read rows and plan. Raises InputRefused, WillNotFit."""
    recipe = start.recipe
    read = base_config(recipe.base)  # refuses a base that cannot be read before rows are
    tokenizer = load_tokenizer(recipe.base.model)
    clock = start.processes.from_main(lambda: _clock(start))
    tasks = prepare(recipe.data, tokenizer, recipe.train.seed, clock)
    config = MixtureConfig.from_recipe(recipe.adapter, len(recipe.data.tasks))
    check_rows(config, tasks)
    check_spans(config, recipe, tasks)
    check_limits(tasks, tokenizer, read)
    check_judging(recipe, tasks)
    check_prompts(recipe, tasks)
    asked = tasks_to_score(tasks)
    planned = fitting_plan(recipe, start.processes, start.before)
    if recipe.train.optimizer == "auto":
        chosen = recipe.train.model_copy(update={"optimizer": planned.layout.optimizer})
        recipe = recipe.model_copy(update={"train": chosen})
    return Inputs(recipe, config, tokenizer, tasks, asked, planned, clock)


def _clock(start: Start) -> str:
    kept = clock_of(start.folder) if start.before is not None else None
    return kept or datetime.now().isoformat(timespec="seconds")


def _identified(start: Start, inputs: Inputs) -> Ancestry:
    """Return the run's identity so far. Raises InputRefused where it is not that of the run to be resumed."""
    ancestry = Ancestry(start.before, start.allow_changed, start.processes)
    ancestry.add(identity_of_inputs(inputs.recipe, inputs.tokenizer, inputs.tasks, start.processes))
    return ancestry


def _course(inputs: Inputs) -> Course:
    recipe = inputs.recipe
    mixture = TaskMix(recipe.data, inputs.tasks, recipe.train.seed)
    capacity = None
    if recipe.data.packing:
        capacity = recipe.data.max_length
    return Course(mixture, inputs.tasks, recipe.train.global_batch, num_steps(recipe.train, mixture), capacity)


def num_steps(settings: Train, mixture: TaskMix) -> int:
    """Return the updates of a run; an epoch counts every row of a task as often as the task's own `epochs` says."""
    if settings.steps is not None:
        return settings.steps
    if settings.epochs is None:
        rows: float = mixture.rows_until_stop()
    else:
        rows = settings.epochs * mixture.rows_per_epoch
    return math.ceil(rows / settings.global_batch)


def _started_model(start: Start, inputs: Inputs, mixture: TaskMix) -> tuple[PeftModel, dict[str, Tensor]]:
    """Return the adapted base at its start, and what of the adapter is to stay as it is."""
    model = _adapted_model(start, inputs)
    if inputs.recipe.data.packing:
        check_isolation(model)

    def first_batches() -> Iterator[dict[str, Tensor]]:
        for first in itertools.count(0, inputs.planned.micro_batch):
            batch = collate(mixture.rows(first, inputs.planned.micro_batch), inputs.tokenizer.pad_token_id)
            yield {name: tensor.to(start.processes.device) for name, tensor in batch.items()}

    frozen = start_adapter(model, inputs.config, inputs.recipe, first_batches)
    if objective_of(inputs.recipe.objective).has_head:
        start_path, over = inputs.recipe.adapter.start, inputs.recipe.tasks_over_experts
        add_head(model, inputs.recipe.train.seed, None if start_path is None else start_folder(start_path), over)
    model.train()
    return model, frozen


def _adapted_model(start: Start, inputs: Inputs) -> PeftModel:
    recipe, layout, device = inputs.recipe, inputs.planned.layout, start.processes.device
    if recipe.memory.engine != "none":
        layout = replace(layout, stream=False)  # the engine moves weights itself, once it has them whole
    place, keep_from = device, None
    if layout.stream:
        place = torch.device("cpu")  # a streamed base must not be on the device as a whole, not even once
    if start.processes.is_main:
        keep_from = WORTH_KEEPING if recipe.base.cache == "auto" else 0
    base = load_base(start.folder.base(recipe), place, layout.dtype, keep_from=keep_from)
    prepare_base(base, layout, device)
    return add_adapter(base, inputs.config, recipe.train.seed)


def _updater(start: Start, inputs: Inputs, model: PeftModel, frozen: dict[str, Tensor]) -> Updater:
    """Return who updates what is trained."""
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    parameters, moved = by_rate(inputs.recipe.train, trained), selection_biases(model)
    optimizer = build_optimizer(inputs.recipe.train, inputs.planned.layout.optimizer, parameters)
    if inputs.recipe.memory.engine == "none":
        return PlainUpdater(parameters, optimizer, moved, frozen)
    refuse_storage(model)
    return ZeroUpdater(start.accelerator, model, parameters, optimizer, moved)


def _restored(start: Start, updater: Updater) -> tuple[Progress, list[str]]:
    """Return how far the run is, and what was wrong with checkpoints that were passed over."""
    if start.before is not None:
        return restore(start.folder, updater, start.processes)
    return Progress(), []


def _open(start: Start, inputs: Inputs, ancestry: Ancestry, progress: Progress) -> None:
    """Write what the run begins with: from here on there is a run."""
    device = start.processes.device
    manifest: Manifest = {
        "identity": ancestry.identity,
        "lineage": ancestry.lineage(progress.step),
        "device": device_name(device),
        "clock": inputs.clock,
        "threads": torch.get_num_threads(),
        "plan": inputs.planned.to_json(),
    }
    start.processes.from_main(
        lambda: open_folder(start.folder, inputs.recipe, manifest, start.before is not None, progress.step)
    )
    if inputs.recipe.train.trackers:
        start.accelerator.init_trackers("qd2mora", config={"fingerprint": inputs.recipe.fingerprint()})
    if compute_dtype(inputs.recipe.base, device) is torch.float16 and progress.loss_scale is None:
        progress.loss_scale = FIRST_LOSS_SCALE


__all__ = ["Trained", "num_steps", "train"]
