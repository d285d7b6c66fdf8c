"""A comparison under way, and one training of it: its recipe, and going on where an earlier start was stopped."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qd2mora.comparison.comparison_folder import ComparisonFolder
from qd2mora.comparison.matched_arms import Arm
from qd2mora.comparison.settings import ComparisonSettings
from qd2mora.comparison.tuning import Setting, Space, candidates, widened
from qd2mora.mixture import MixtureConfig
from qd2mora.recipe import Recipe
from qd2mora.run_folder import RunFolder, is_run
from qd2mora.terminal.pace import Pace
from qd2mora.training import train


@dataclass(frozen=True)
class Trials:
    """A comparison under way: `recipe` learns from its split; `num_steps` of a run, the recipe's epochs where None."""

    recipe: Recipe
    settings: ComparisonSettings
    folder: ComparisonFolder
    say: Callable[[str], None]
    num_steps: int | None = None
    pace: Pace | None = None
    """Counts the steps of all trainings."""

    def trained(self, steps: int | None, *, is_known: bool) -> None:
        """Count a training, of an earlier start or of this one."""
        if self.pace is not None:
            self.pace.advance(steps or 1, is_known=is_known)


@dataclass(frozen=True)
class Training:
    """One training: an arm with a seed at a setting, for so many steps, in its folder."""

    arm: Arm
    seed: int
    setting: Setting
    steps: int | None
    folder: Path


def space_of(settings: ComparisonSettings, arm: Arm, recipe: Recipe) -> dict[str, tuple[float, ...]]:
    """Return what is swept for an arm: no rates of parts that it does not have."""
    config = MixtureConfig.from_recipe(arm.adapter, len(recipe.data.tasks))
    lacks = set()
    if all(gate.input == "self" or gate.select == "fixed" for gate in config.routers.values()):
        lacks.add("router")
    if config.row.core == "none":
        lacks.add("core")
    if "mixture_A" in config.frozen_tensors:
        lacks.add("down")
    swept: Space = dict(settings.space)
    if settings.rates:
        swept = {"rate": settings.rates, **swept}
    return {key: values for key, values in widened(swept, recipe.train.learning_rate).items() if key not in lacks}


def num_settings(settings: ComparisonSettings, arm: Arm, recipe: Recipe) -> tuple[int, bool]:
    """Return how many settings are tried for an arm, and whether fewer and fewer of them for longer and longer."""
    return len(candidates(space_of(settings, arm, recipe), settings.tries)), settings.tries is not None


def recipe_of(recipe: Recipe, training: Training) -> Recipe:
    """Return the recipe of a training."""
    settings = recipe.train.model_copy(update=training.arm.train)
    changes: dict[str, object] = {"seed": training.seed}
    if training.steps is not None:
        changes |= {"steps": training.steps, "epochs": None}
        # A tenth at most: a short trial must not be over while it warms up.
        changes["warmup_steps"] = min(settings.warmup_steps, training.steps // 10)
    settings = training.setting.of_train(settings).model_copy(update=changes)
    content: dict[str, object] = {
        "adapter": training.setting.of_adapter(training.arm.adapter),
        "train": settings,
        "output": str(training.folder),
    }
    if settings.early_stopping is None and settings.final == "last":
        # The rows to choose by are judged by their loss: scoring them too would only cost time.
        tasks = [task.model_copy(update={"metric": None}) for task in recipe.data.tasks]
        content["data"] = recipe.data.model_copy(update={"tasks": tasks})
    return recipe.model_copy(update=content)


def train_through(recipe: Recipe) -> None:
    """Train, or go on where an earlier start was stopped; a run that is finished stays as it is."""
    folder = RunFolder(Path(recipe.output))
    if not (folder.adapter / "adapter_model.safetensors").is_file():
        train(recipe, resume=is_run(folder.path))


def seconds_a_step(folder: Path) -> float:
    """Return the median time of a run's steps: of the processor where one trained, by the clock elsewhere."""
    lines = RunFolder(folder).metric_lines()
    # The median: the first step also compiles, allocates and reads.
    return statistics.median(line["step_s"] for line in lines if "step_s" in line)


def seconds_by_the_clock(folder: Path) -> float:
    """Return the median time of a run's steps as it passes."""
    lines = RunFolder(folder).metric_lines()
    return statistics.median(line["tokens"] / line["tokens_per_s"] for line in lines if "tokens_per_s" in line)


def steps_done(folder: Path) -> int:
    """Return the steps of a finished run."""
    lines = RunFolder(folder).metric_lines()
    return max(int(line["step"]) for line in lines)


__all__ = [
    *("Training", "Trials", "num_settings", "recipe_of", "seconds_a_step", "seconds_by_the_clock"),
    *("space_of", "steps_done", "train_through"),
]
