"""A run put together: what a start is given, what it has read, and the loop made of both."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from qd2mora.data import TaskRows
from qd2mora.data.chat import named_templates
from qd2mora.evaluation import AskedTask, Score, Subject
from qd2mora.memory.plan import Plan
from qd2mora.mixture import MixtureConfig
from qd2mora.objectives import objective_of
from qd2mora.objectives.rules import Rule
from qd2mora.recipe import Recipe
from qd2mora.recipe.train import LearnedRouting
from qd2mora.run_folder import RunFolder
from qd2mora.stopping import StopRequest
from qd2mora.training.best import BestKeeper
from qd2mora.training.checkpoint import Saver, steps_on_disk
from qd2mora.training.clock import TimeLimit, Watchdog
from qd2mora.training.gradient import StepGradient
from qd2mora.training.growth import Opening, Parts
from qd2mora.training.held_out import HeldOut, LiveRouting, score_together
from qd2mora.training.identity import Ancestry, Manifest
from qd2mora.training.journal import Journal
from qd2mora.training.kept_reference import keep_reference, made_of, waiting_tasks
from qd2mora.training.loop import Training
from qd2mora.training.micro_batches import Course, MicroBatches
from qd2mora.training.processes import Processes
from qd2mora.training.progress import Progress
from qd2mora.training.result import save_whole
from qd2mora.training.rollouts import Rollouts
from qd2mora.training.stages import Stages
from qd2mora.training.updates import Updater


@dataclass(frozen=True)
class Start:
    """One start of a run, the first or a resumed one, on the processes that a launcher gave it."""

    recipe: Recipe
    folder: RunFolder
    accelerator: Accelerator
    processes: Processes
    stop: StopRequest
    time_limit: TimeLimit
    before: Manifest | None
    """What the run that is resumed says of itself."""
    allow_changed: Collection[str]
    reward_file: Path | None = None
    rule: Rule | None = None
    """What `grpo` judges by."""


@dataclass(frozen=True)
class Inputs:
    """What is read before any weight; the recipe names the optimiser that the plan chose, a part of the identity."""

    recipe: Recipe
    config: MixtureConfig
    tokenizer: PreTrainedTokenizerBase
    tasks: list[TaskRows]
    asked: list[AskedTask]
    """Tasks that are scored beside the loss."""
    planned: Plan
    clock: str
    """The time that chat templates read, kept for every resume."""


def micro_batches_of(
    inputs: Inputs,
    model: PeftModel,
    updater: Updater,
    processes: Processes,
    progress: Progress,
    journal: Journal,
) -> MicroBatches:
    """Return what runs rows through the model, in the plan's micro batches, or smaller ones where memory ran out."""
    planned, settings, by_layer = inputs.planned.micro_batch, inputs.recipe.train, inputs.planned.layout.rows_by_layer
    return MicroBatches(
        model=model,
        updater=updater,
        processes=processes,
        progress=progress,
        say=journal.say,
        # What a run has learned of its memory holds after a resume too; and no process has more rows than its part of a
        # step.
        size=min(planned, progress.micro_batch or planned, settings.global_batch // processes.count),
        seed=settings.seed,
        pad=inputs.tokenizer.pad_token_id,
        loss_chunk=inputs.planned.layout.loss_chunk,
        objective=objective_of(inputs.recipe.objective),
        rows_by_layer=by_layer if progress.rows_by_layer is None else min(by_layer, progress.rows_by_layer),
    )


def keep_reference_of(inputs: Inputs, ancestry: Ancestry, training: Training) -> None:
    """Compute what the reference says of the run's rows, where the recipe wants it kept; pass over tasks not due.

    Raises WillNotFit, InputRefused.
    """
    batches = training.batches
    if batches.reference is None or inputs.recipe.objective.reference != "kept":
        return
    of = made_of(ancestry.identity, batches.reference, inputs.planned.micro_batch)
    pace = training.journal.pace("lines that the reference reads", training.course.num_lines)
    keep_reference(batches, training.course, of, pace)
    if inputs.recipe.objective.consolidate == "due":
        training.course.waiting = waiting_tasks(training.course, batches.reference, training.journal.say)


def training_of(
    start: Start, inputs: Inputs, course: Course, batches: MicroBatches, journal: Journal, mark: dict[str, str]
) -> Training:
    """Put the loop together; `mark` is what an adapter remembers of its base. Raises InputRefused."""
    stages = Stages.of(inputs.recipe, course.total_steps)
    model, processes, progress = batches.model, batches.processes, batches.progress
    folder, settings = start.folder, inputs.recipe.train
    best = BestKeeper(folder.best, settings.keep_best, lambda place: save_whole(model, place, mark), processes.is_main)
    best.resumed(progress)
    parts = Parts.of_run(inputs.config, settings.growth)
    subject = Subject(model, inputs.tokenizer, templates=named_templates(inputs.recipe.data))
    live = LiveRouting(model, inputs.tasks, inputs.recipe.tasks_over_experts is not None)

    def score(goes_on: Callable[[], bool]) -> dict[str, Score]:
        pace = journal.pace("rows asked", sum(len(task.rows) for task in inputs.asked))
        return score_together(subject, inputs.asked, processes, pace, goes_on)

    rollouts = None
    if inputs.recipe.objective.kind == "grpo":
        assert start.rule is not None
        rollouts = Rollouts(batches, subject, inputs.recipe, start.rule, journal.say)
    watchdog = Watchdog(
        is_on_cpu=processes.device.type == "cpu",
        last_saved=lambda: max(steps_on_disk(folder.checkpoints), default=0),
    )
    return Training(
        train=settings,
        course=course,
        progress=progress,
        gradient=StepGradient(
            batches,
            course,
            inputs.config,
            settings.max_grad_norm,
            settings.routing or LearnedRouting(),
            Opening(model, batches.updater, progress, settings.growth, parts, course.total_steps),
            stages,
            rollouts,
        ),
        held_out=HeldOut(batches, inputs.tasks, live, score, watchdog, journal.pace, rollouts, start.stop),
        saver=Saver(folder.checkpoints, settings.keep_checkpoints, batches.updater, processes.is_main),
        best=best,
        journal=journal,
        stop=start.stop,
        time_limit=start.time_limit,
    )


__all__ = ["Inputs", "Start", "keep_reference_of", "micro_batches_of", "training_of"]
