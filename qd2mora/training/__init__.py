"""Training: from a recipe to a run folder."""

import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerBase

from qd2mora.base import (
    base_config,
    compute_dtype,
    default_device,
    enable_checkpointing,
    fingerprint,
    load_base,
    load_tokenizer,
)
from qd2mora.data import Mixture, TaskRows, collate, content_hash, prepare
from qd2mora.errors import InputRefused, WillNotFit
from qd2mora.memory.loss import RowLoss
from qd2mora.memory.plan import Plan, plan
from qd2mora.mixture import MixtureConfig, add_adapter
from qd2mora.recipe import Recipe, Train
from qd2mora.run_folder import RunFolder, is_run, read_recipe, refuse_taken, staged_folder, write_atomically, write_json
from qd2mora.training import checkpoint
from qd2mora.training.loop import Training
from qd2mora.training.optimizer import build_optimizer
from qd2mora.training.progress import StepDisplay
from qd2mora.training.stages import check_stages
from qd2mora.training.start import check_rows, start_adapter

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "qd2mora")


@dataclass(frozen=True)
class Trained:
    """What a run ended with."""

    folder: Path
    steps: int
    eval_loss: dict[str, float]
    bad_steps: int


def train(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> Trained:
    """Plan, then train; write the run folder `recipe.output`.

    Everything that can be refused is refused before the folder is touched. `resume` continues from the newest whole
    checkpoint and ends with the same bytes as a run that was never broken; `overwrite` replaces a run.

    Raises InputRefused, WillNotFit, NotFinite, SignalStop, DamagedFile.
    """
    folder = RunFolder(Path(recipe.output))
    config = MixtureConfig.from_recipe(recipe.adapter, len(recipe.data.tasks))
    check_stages(config, recipe.train)
    _check_folder(folder, recipe, resume, overwrite)
    base_config(recipe.base)
    tokenizer = load_tokenizer(recipe.base.model)
    tasks = prepare(recipe.data, tokenizer, recipe.train.seed)
    check_rows(config, tasks)
    accelerator = _accelerator(recipe, folder)
    planned = plan(recipe, device=accelerator.device)
    if not planned.fits:
        ways = "; ".join(planned.ways_out)
        assert planned.budget_bytes is not None
        needed, there = planned.peak_bytes / 2**30, planned.budget_bytes / 2**30
        raise WillNotFit(f"memory: needs {needed:.2f} GiB of {there:.2f} GiB; ways out: {ways}")
    base = load_base(recipe.base, accelerator.device)
    if planned.checkpointing:
        enable_checkpointing(base)
    model = add_adapter(base, config, recipe.train.seed)
    mixture = Mixture(recipe.data, tasks, recipe.train.seed)
    start_adapter(model, config, recipe, lambda: _first_batches(mixture, planned.micro_batch, tokenizer, model.device))
    model.train()
    parameters = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    optimizer = build_optimizer(recipe.train, list(parameters.values()))
    start = _open_folder(folder, recipe, planned, parameters, optimizer, accelerator, resume)
    total = num_steps(recipe.train, mixture.rows_per_epoch)
    row_loss, prepared = accelerator.prepare(RowLoss(model), optimizer)
    training = Training(
        train=recipe.train,
        folder=folder,
        accelerator=accelerator,
        model=model,
        row_loss=row_loss,
        parameters=parameters,
        optimizer=prepared,
        mixture=mixture,
        tasks=tasks,
        config=config,
        micro_batch=planned.micro_batch,
        total_steps=total,
        pad=tokenizer.pad_token_id,
    )
    display = StepDisplay(total, start)
    if accelerator.is_main_process:
        _say_what_starts(display, tasks, planned, start, total)
    losses = training.run(start, display)
    if accelerator.is_main_process:
        with staged_folder(folder.adapter) as stage:
            model.save_pretrained(str(stage))
        tokenizer.save_pretrained(folder.path)
    accelerator.end_training()
    return Trained(folder.path, total, losses, training.bad_steps)


def _first_batches(
    mixture: Mixture, rows: int, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the run's first rows in batches."""
    for start in itertools.count(0, rows):
        batch = collate(mixture.rows(start, rows), tokenizer.pad_token_id)
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def num_steps(settings: Train, rows_per_epoch: int) -> int:
    """Return the updates of a run; epochs count every row of every task once."""
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None
    return math.ceil(settings.epochs * rows_per_epoch / settings.global_batch)


def _check_folder(folder: RunFolder, recipe: Recipe, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise InputRefused("give --resume or --overwrite, not both")
    if resume:
        _refuse_changed(read_recipe(folder.path), recipe)
    elif overwrite and is_run(folder.path):
        return
    else:
        try:
            refuse_taken(folder.path, "output")
        except InputRefused as error:
            hint = "; continue it with --resume or replace it with --overwrite" if is_run(folder.path) else ""
            raise InputRefused(f"{error}{hint}") from None


def _refuse_changed(before: Recipe, now: Recipe) -> None:
    """A resumed run must be the same run: name the first key that decides the weights and differs."""
    if before.fingerprint() == now.fingerprint():
        return
    changed = [
        f"{section}.{key}: {old!r} became {new!r}"
        for section in ("base", "adapter", "data", "train")
        for key, old in getattr(before, section).model_dump().items()
        if (new := getattr(now, section).model_dump()[key]) != old
    ]
    raise InputRefused(f"--resume: the recipe changed since the run began ({changed[0]}); take it back or start anew")


def _accelerator(recipe: Recipe, folder: RunFolder) -> Accelerator:
    for tracker in recipe.train.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise InputRefused(f"train.trackers: {tracker} is not installed; pip install {tracker}")
    device = default_device()
    dtype = compute_dtype(recipe.base, device)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="fp16" if dtype is torch.float16 and device.type == "cuda" else "no",
        log_with=list(recipe.train.trackers) or None,
        project_dir=str(folder.path),
    )
    rows, processes = recipe.train.global_batch, accelerator.num_processes
    if rows % processes:
        raise InputRefused(f"train.global_batch: {rows} rows do not divide over {processes} processes")
    set_seed(recipe.train.seed)
    return accelerator


def _open_folder(
    folder: RunFolder,
    recipe: Recipe,
    planned: Plan,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    resume: bool,
) -> int:
    """Make or reopen the folder; return the update to start from."""
    start = 0
    if resume:
        start, problems = checkpoint.restore_newest(folder.checkpoints, parameters, optimizer)
        for problem in problems:
            print(f"passed over: {problem}")
    if accelerator.is_main_process:
        if not resume and folder.path.exists():
            shutil.rmtree(folder.path)
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        _forget_after(folder.metrics, start)
        write_atomically(folder.recipe, recipe.dump_yaml())
        write_json(folder.manifest, _manifest(recipe, planned, accelerator))
    accelerator.wait_for_everyone()
    if recipe.train.trackers:
        accelerator.init_trackers("qd2mora", config={"fingerprint": recipe.fingerprint()})
    return start


def _forget_after(metrics: Path, step: int) -> None:
    """Drop the lines of steps that will be done again, and a last line cut short by a kill."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    write_atomically(metrics, "".join(line + "\n" for line in kept))


def _manifest(recipe: Recipe, planned: Plan, accelerator: Accelerator) -> dict[str, Any]:
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu",
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "recipe": recipe.fingerprint(),
        "base": fingerprint(recipe.base),
        "data": {task.name: content_hash(task.path) for task in recipe.data.tasks},
        "plan": planned.to_json(),
    }


def _say_what_starts(display: StepDisplay, tasks: list[TaskRows], planned: Plan, start: int, total: int) -> None:
    for task in tasks:
        notes = [f"{len(task.train)} rows", f"{len(task.validation)} held out"]
        notes += [f"{task.num_cut} cut at the end"] if task.num_cut else []
        notes += [f"{task.num_dropped} dropped (no room for the answer)"] if task.num_dropped else []
        display.say(f"task {task.task.name}: {', '.join(notes)}")
    layers = "recomputed" if planned.checkpointing else "kept"
    display.say(
        f"training {planned.trainable_parameters:,} parameters, micro batch {planned.micro_batch}, "
        f"activations {layers}, planned peak {planned.peak_bytes / 2**30:.2f} GiB; steps {start} to {total}"
    )


__all__ = ["Trained", "train"]
