"""Training: from a recipe to a run folder."""

import contextlib
import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from qd2mora.adapter_folder import base_identity, save_adapter
from qd2mora.base import (
    base_config,
    compute_dtype,
    fingerprint,
    load_base,
    load_tokenizer,
)
from qd2mora.data import TaskMix, TaskRows, collate, prepare, share_lines
from qd2mora.disk.durable import save_pretrained
from qd2mora.errors import InputRefused, WillNotFit
from qd2mora.evaluation import AskedTask, Subject, ask_held_out
from qd2mora.evaluation.rouge import rouge_l
from qd2mora.inspection import write_routing
from qd2mora.memory.engine import check_engine, refuse_storage
from qd2mora.memory.faults import as_lost
from qd2mora.memory.loss import check_isolation
from qd2mora.memory.plan import Plan, plan
from qd2mora.memory.prepared import prepare_base
from qd2mora.mixture import MixtureConfig, adapter_tensors, add_adapter, selection_biases
from qd2mora.recipe import Recipe, Train
from qd2mora.run_folder import RunFolder
from qd2mora.stopping import StopRequest, listening
from qd2mora.training.best import BestKeeper
from qd2mora.training.disk import as_trouble, checkpoint_bytes, refuse_full
from qd2mora.training.identity import identity_of_inputs, refuse_changed
from qd2mora.training.journal import Journal
from qd2mora.training.launch import launched
from qd2mora.training.lock import locked
from qd2mora.training.loop import Training
from qd2mora.training.opening import check_folder, lineage, open_folder, read_manifest, restore
from qd2mora.training.optimizer import build_optimizer
from qd2mora.training.processes import Processes
from qd2mora.training.progress import StepDisplay
from qd2mora.training.rehearsal import is_worthwhile, rehearse
from qd2mora.training.saver import Saver
from qd2mora.training.scores import score_together
from qd2mora.training.stages import check_stages
from qd2mora.training.start import check_packing, check_rows, start_adapter
from qd2mora.training.state import LocalState, Progress, StateSource
from qd2mora.training.time_limit import TimeLimit
from qd2mora.training.zero import ZeroOptimizer, ZeroState

FIRST_LOSS_SCALE = 2.0**16
WORTH_KEEPING = 512 << 20
"""Bytes of 4-bit weights from which on they are kept where the recipe leaves that open: fewer are made in seconds."""
MOST_ROWS_COUNTED = 200_000
"""Rows that the shares of tasks are told of; in longer runs they stay what they are."""


@dataclass(frozen=True)
class Trained:
    """What a run ended with."""

    folder: Path
    steps: int
    eval_loss: dict[str, float]
    bad_steps: int
    is_main: bool = True


def train(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, allow_changed: Collection[str] = ()
) -> Trained:
    """Plan, then train; write the run folder `recipe.output`.

    Everything that can be refused is refused before the folder is touched. `resume` continues from the newest whole
    checkpoint and ends with the same bytes as a run that was never broken; it is refused where a field of the run's
    identity changed, unless `allow_changed` names it. `overwrite` replaces a run.

    Raises InputRefused, WillNotFit, DeviceLost, NotFinite, DiskTrouble, DamagedFile, SignalStop.
    """
    folder = RunFolder(Path(recipe.output))
    config = MixtureConfig.from_recipe(recipe.adapter, len(recipe.data.tasks))
    check_stages(config, recipe.train)
    if recipe.data.packing:
        check_packing(config)
    check_engine(recipe, config)
    with listening() as stop, as_lost(), contextlib.ExitStack() as held:
        accelerator = launched(recipe, folder)
        processes = Processes.of(accelerator)

        def take_folder() -> None:
            check_folder(folder, resume, overwrite)
            held.enter_context(locked(folder.lock))
            check_folder(folder, resume, overwrite)  # what was true before the lock need not be

        processes.from_main(take_folder)
        return _train_locked(recipe, folder, accelerator, stop, resume, allow_changed)


def num_steps(settings: Train, mixture: TaskMix) -> int:
    """Return the updates of a run; an epoch counts every row of a task as often as the task's own `epochs` says."""
    if settings.steps is not None:
        return settings.steps
    epochs = settings.epochs
    rows = mixture.rows_until_stop() if epochs is None else epochs * mixture.rows_per_epoch
    return math.ceil(rows / settings.global_batch)


def _train_locked(
    recipe: Recipe,
    folder: RunFolder,
    accelerator: Accelerator,
    stop: StopRequest,
    resume: bool,
    allow_changed: Collection[str],
) -> Trained:
    time_limit = TimeLimit(recipe.train)
    processes = Processes.of(accelerator)
    base_config(recipe.base)
    tokenizer = load_tokenizer(recipe.base.model)
    tasks = prepare(recipe.data, tokenizer, recipe.train.seed)
    config = MixtureConfig.from_recipe(recipe.adapter, len(recipe.data.tasks))
    check_rows(config, tasks)
    _check_judging(recipe, tasks)
    asked = _asked_while_training(tasks)
    planned = _fitting_plan(recipe, accelerator.device)
    if recipe.train.optimizer == "auto":  # from here on it is what the plan chose: a part of the run's identity
        optimizer_chosen = recipe.train.model_copy(update={"optimizer": planned.setting.optimizer})
        recipe = recipe.model_copy(update={"train": optimizer_chosen})
    is_rehearsed = processes.from_main(lambda: is_worthwhile(recipe, planned))
    processes.from_main(lambda: refuse_full(folder.path, _bytes_to_write(recipe, planned)))
    before = processes.from_main(lambda: read_manifest(folder)) if resume else None
    identity = identity_of_inputs(recipe, tokenizer, tasks, processes.count, accelerator.device)
    processes.refuse_other(identity)
    changed = refuse_changed(before["identity"], identity, allow_changed) if before else []
    mixture = TaskMix(recipe.data, tasks, recipe.train.seed)
    model = _adapted_model(recipe, config, planned, processes, folder)
    if recipe.data.packing:
        check_isolation(model)
    start_adapter(
        model, config, recipe, lambda: _first_batches(mixture, planned.micro_batch, tokenizer, accelerator.device)
    )
    model.train()
    identity["base"] = fingerprint(recipe.base)  # after the load, which fetches what is not here yet
    processes.refuse_other({"base": identity["base"]})
    if before:
        changed += refuse_changed(before["identity"], {"base": identity["base"]}, allow_changed)
    processes.copy_from_main(adapter_tensors(model))
    parameters = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    optimizer, source = _updater(recipe, accelerator, model, parameters)
    progress, problems = restore(folder, source, processes) if resume else (Progress(), [])
    manifest = {
        "identity": identity,
        "lineage": lineage(before, identity, changed, progress.step),
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "plan": planned.to_json(),
    }
    processes.from_main(lambda: open_folder(folder, recipe, manifest, resume, progress.step))
    if recipe.train.trackers:
        accelerator.init_trackers("qd2mora", config={"fingerprint": recipe.fingerprint()})
    total = num_steps(recipe.train, mixture)
    if compute_dtype(recipe.base, accelerator.device) is torch.float16 and progress.loss_scale is None:
        progress.loss_scale = FIRST_LOSS_SCALE
    rows_each = recipe.train.global_batch // processes.count
    display = StepDisplay(total, progress.step)
    mark = base_identity(recipe.base, identity["base"])
    best = BestKeeper(
        folder.best,
        recipe.train.keep_best,
        lambda place: save_adapter(model, place, mark),
        accelerator.is_main_process,
    )
    best.resumed(progress)
    training = Training(
        train=recipe.train,
        processes=processes,
        model=model,
        parameters=parameters,
        optimizer=optimizer,
        mixture=mixture,
        tasks=tasks,
        config=config,
        loss_chunk=planned.setting.loss_chunk,
        micro_batch=min(planned.micro_batch, progress.micro_batch or planned.micro_batch, rows_each),
        total_steps=total,
        pad=tokenizer.pad_token_id,
        progress=progress,
        saver=Saver(folder.checkpoints, recipe.train.keep_checkpoints, source, accelerator.is_main_process),
        journal=Journal(folder.metrics, accelerator, display),
        stop=stop,
        time_limit=time_limit,
        best=best,
        capacity=recipe.data.max_length if recipe.data.packing else None,
        score=lambda: score_together(Subject(model, tokenizer), asked, processes),
    )
    for problem in problems:
        training.journal.say(f"passed over: {problem}")
    _say_what_starts(training, planned)
    with stop.deferred(), display:
        if is_rehearsed and progress.step < total:
            rehearse(training, planned, recipe.train.optimizer)
        losses = training.run()
        processes.from_main(lambda: _save_result(folder, training, tokenizer, mark, recipe.train.final))
    accelerator.end_training()
    return Trained(folder.path, progress.step, losses, progress.bad_steps, accelerator.is_main_process)


def _updater(
    recipe: Recipe, accelerator: Accelerator, model: PeftModel, parameters: dict[str, nn.Parameter]
) -> tuple[torch.optim.Optimizer | ZeroOptimizer, StateSource]:
    """Return who updates the parameters, and where a checkpoint's content comes from."""
    plain, moved = build_optimizer(recipe.train, list(parameters.values())), selection_biases(model)
    if recipe.memory.engine == "none":
        return plain, LocalState(parameters, plain, moved)
    refuse_storage(model)
    sharded = ZeroOptimizer(accelerator, model, parameters, plain)
    return sharded, ZeroState(sharded, moved)


def _fitting_plan(recipe: Recipe, device: torch.device) -> Plan:
    planned = plan(recipe, device=device)
    if not planned.fits:
        assert planned.budget_bytes is not None
        needed, there, ways = planned.peak_bytes / 2**30, planned.budget_bytes / 2**30, "; ".join(planned.ways_out)
        raise WillNotFit(f"memory: needs {needed:.2f} GiB of {there:.2f} GiB; ways out: {ways}")
    return planned


def _bytes_to_write(recipe: Recipe, planned: Plan) -> int:
    """All kept checkpoints, the one being written, the adapter, and the export where one is asked for."""
    size = checkpoint_bytes(planned.trainable_parameters, recipe.train.optimizer)
    weights = Path(recipe.base.model).glob("*.safetensors") if recipe.finish.export else []
    export = sum(path.stat().st_size for path in weights)
    # The result, and the best: kept, about to be, and where every task has its own, those.
    adapters = {"none": 1, "overall": 3, "tasks": 3 + len(recipe.data.tasks)}[recipe.train.keep_best]
    return (recipe.train.keep_checkpoints + 1) * size + adapters * 4 * planned.trainable_parameters + export


def _adapted_model(
    recipe: Recipe, config: MixtureConfig, planned: Plan, processes: Processes, folder: RunFolder
) -> PeftModel:
    setting, device = planned.setting, processes.device
    if recipe.memory.engine != "none":
        setting = replace(setting, stream=False)  # the engine moves weights itself, once it has them whole
    # A streamed base must not be on the device as a whole, not even once.
    place = torch.device("cpu") if setting.stream else device
    least = WORTH_KEEPING if recipe.base.cache == "auto" else 0
    base = load_base(folder.base(recipe), place, setting.dtype, keep_from=least if processes.is_main else None)
    prepare_base(base, setting, device)
    return add_adapter(base, config, recipe.train.seed)


def _first_batches(
    mixture: TaskMix, rows: int, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the run's first rows in batches."""
    for start in itertools.count(0, rows):
        batch = collate(mixture.rows(start, rows), tokenizer.pad_token_id)
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def _save_result(
    folder: RunFolder, training: Training, tokenizer: PreTrainedTokenizerBase, identity: dict[str, str], final: str
) -> None:
    with as_trouble("the adapter", folder.path):
        save_adapter(training.model, folder.adapter, identity)
        save_pretrained(tokenizer, folder.path)
    if final == "best":
        _take_best(training, folder)
    else:
        _save_routing(folder, training)


def _take_best(training: Training, folder: RunFolder) -> None:
    """Let the adapter of the best evaluation be the run's result."""
    with as_trouble("the adapter", folder.path):
        step = training.best.copy_to(folder.adapter, training.progress)
        folder.routing.unlink(missing_ok=True)  # what was measured may be another step's
    training.journal.say(f"adapter/ holds step {step}, the best overall")


def _asked_while_training(tasks: list[TaskRows]) -> list[AskedTask]:
    """Return the tasks that name a metric other than the loss, to be scored beside it. Raises InputRefused."""
    asked = ask_held_out([task for task in tasks if task.task.metric not in (None, "loss")])
    if any(task.metric == "rouge" for task in asked):
        rouge_l()
    return asked


def _check_judging(recipe: Recipe, tasks: list[TaskRows]) -> None:
    """Refuse to judge without held-out rows. Raises InputRefused."""
    key = "final" if recipe.train.final == "best" else "early_stopping"
    if (recipe.train.early_stopping or key == "final") and not any(task.validation for task in tasks):
        raise InputRefused(f"train.{key}: no task holds out rows to judge by; set data.tasks.0.validation=200")


def _save_routing(folder: RunFolder, training: Training) -> None:
    """Write what routers did in the last evaluation; a run that was over before has its report, or gets it when asked.

    A method without routers is told as such.
    """
    if training.live.step is not None or not training.live.watch.routers:
        with as_trouble("the routing report", folder.path):
            write_routing(folder, training.live.report())


def _say_what_starts(training: Training, planned: Plan) -> None:
    for task in training.tasks:
        notes = [f"{len(task.train)} rows", f"{len(task.validation)} held out"]
        notes += [f"{task.num_cut} cut at the end"] if task.num_cut else []
        notes += [f"{task.num_dropped} dropped (no room for the answer)"] if task.num_dropped else []
        training.journal.say(f"task {task.task.name}: {', '.join(notes)}")
    count = min(training.total_steps * training.train.global_batch, MOST_ROWS_COUNTED)
    for line in share_lines(training.mixture.shares(count), training.mixture.by_tokens):
        training.journal.say(line)
    layers = f"recomputed in {planned.setting.recomputed} layers" if planned.checkpointing else "kept"
    training.journal.say(
        f"training {planned.trainable_parameters:,} parameters, micro batch {training.micro_batch}, activations "
        f"{layers}, planned peak {planned.peak_bytes / 2**30:.2f} GiB; steps {training.progress.step} to "
        f"{training.total_steps}"
    )


__all__ = ["Trained", "train"]
