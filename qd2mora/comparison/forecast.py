"""A comparison before its start: how many trainings, of how many steps, and how long they may take together."""

from collections.abc import Callable, Mapping

from qd2mora.base import RANDOM, load_tokenizer
from qd2mora.comparison.arms_file import Wish
from qd2mora.comparison.matched_arms import Arm, matched_arms
from qd2mora.comparison.settings import ComparisonSettings
from qd2mora.comparison.trials import num_settings, space_of
from qd2mora.comparison.tuning import rungs_of
from qd2mora.data import first_rows
from qd2mora.memory.plan import plan
from qd2mora.recipe import Recipe
from qd2mora.terminal.pace import in_words
from qd2mora.training.timing import Pass, num_steps, outlook, seconds_of_training


def forecast(
    recipe: Recipe, settings: ComparisonSettings, wishes: Mapping[str, Wish] | None = None, *, is_asked: bool
) -> list[str]:
    """Return what a comparison would do, in lines; nothing is trained or written. Raises InputRefused."""
    arms = matched_arms(recipe, list(settings.methods), wishes, settings.targets)
    lines = ["; ".join([f"{arm.name}: {arm.parameters:,} trainable parameters", *arm.notes]) for arm in arms]
    lines += [f"{count} trainings {what}" for count, what, _ in _trainings(recipe, settings, arms, None)]
    if settings.minutes is not None:
        return [*lines, f"time: {settings.minutes:g} min for all training, as --minutes says; scoring comes on top"]
    if recipe.base.model.startswith(RANDOM):
        return [*lines, f"time: not estimated, as '{recipe.base.model}' is not at hand here"]
    tokenizer = load_tokenizer(recipe.base.model)
    rows = list(first_rows(recipe.data, tokenizer))
    words = _of_comparison(recipe, settings, arms)
    return [*lines, outlook(recipe, plan(recipe), rows, tokenizer.pad_token_id, words, is_asked=is_asked)]


def _of_comparison(recipe: Recipe, settings: ComparisonSettings, arms: list[Arm]) -> Callable[[Pass, int | None], str]:
    def say(measured: Pass, steps: int | None) -> str:
        step = recipe.train.global_batch * measured.training
        if steps is None:
            return f"{step:.2g} s a step of {arms[0].name}; how many there are follows from data that was not counted"
        trainings = _trainings(recipe, settings, arms, steps)
        seconds = sum(count * seconds_of_training(recipe, measured, each or steps) for count, _, each in trainings)
        return f"about {in_words(seconds)} for all training, every method taken as {arms[0].name}; scoring comes on top"

    return say


def _trainings(
    recipe: Recipe, settings: ComparisonSettings, arms: list[Arm], steps: int | None
) -> list[tuple[int, str, int | None]]:
    """Return how many trainings there are of each kind, what they are, and their steps."""
    steps = steps or recipe.train.steps
    kinds: dict[tuple[str, int | None], int] = {}
    for arm in arms:
        number, is_halved = num_settings(settings, arm, recipe)
        for count, each in rungs_of(number, settings.sweep_steps or steps, is_halved):
            what = "to choose a setting"
            if set(space_of(settings, arm, recipe)) == {"rate"}:
                what = f"to choose a rate of {', '.join(f'{rate:g}' for rate in settings.rates)}"
            kinds[what, each] = kinds.get((what, each), 0) + count
    if settings.seeds:
        kinds[f"to be scored, {settings.seeds} seeds each", steps] = len(arms) * settings.seeds
    if settings.seeds and settings.equal_time and len(arms) > 1:
        kinds["to be scored at equal time", steps] = (len(arms) - 1) * settings.seeds
    return [(count, f"{what}, {_steps_in_words(each)}", each) for (what, each), count in kinds.items()]


def _steps_in_words(steps: int | None) -> str:
    return "as many steps as its epochs make" if steps is None else f"{steps} steps each"


def steps_in_all(recipe: Recipe, settings: ComparisonSettings, arms: list[Arm], steps: int | None) -> int:
    """Return the steps of all trainings; trainings where steps are not known."""
    known = steps or num_steps(recipe)
    return sum(count * (each or 1) for count, _, each in _trainings(recipe, settings, arms, known))


__all__ = ["forecast", "steps_in_all"]
