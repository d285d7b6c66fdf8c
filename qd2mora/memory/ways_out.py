"""Ways out: what to change where no plan fits the budget, the cheapest to the user first."""

import json
from collections.abc import Callable
from dataclasses import replace

from qd2mora.memory.choosing import GIB, Search
from qd2mora.memory.techniques import Case, exact_changes
from qd2mora.mixture import MixtureConfig
from qd2mora.recipe import Recipe
from qd2mora.recipe.section import Section

LEAST_SAVING = 1 << 20

Changes = dict[str, object]
"""Dotted key to value, as overrides of a recipe."""


def ways_out(search: Search, limit: int, smallest: int, search_of: Callable[[Recipe], Search]) -> tuple[str, ...]:
    """Name up to three changes with what each saves of the `smallest` peak and whether it is enough."""
    recipe = search.case.recipe

    def peak(changed: Recipe) -> int:
        # Shapes are built on the meta device, a second for a 7B: only where the adapter is another.
        if changed.adapter == recipe.adapter:
            now = Search(replace(search.case, recipe=changed))
        else:
            now = search_of(changed)
        return now.peak(now.choose(limit)[0])

    ways, together = [], recipe
    for changes in [*exact_changes(search.case), _shorter(recipe, peak, limit), *_smaller_adapters(search.case)]:
        now = peak(_changed(recipe, changes))
        saved = smallest - now
        if saved >= LEAST_SAVING:
            enough = "not enough alone"
            if now <= limit:
                enough = "enough"
            ways.append((now > limit, f"{_as_overrides(changes)} saves {saved / GIB:.2f} GiB, {enough}"))
            together = _changed(together, changes)
    least = peak(together)
    if least > limit:
        needs = f"all savings known here together still need {least / GIB:.2f} GiB: a smaller base or a larger card"
        return (*(words for _, words in ways[:2]), needs)
    # Stable, with what is enough alone first; within, by what it costs the user.
    ways.sort(key=lambda way: way[0])
    return tuple(words for _, words in ways[:3])


def _shorter(recipe: Recipe, peak: Callable[[Recipe], int], limit: int) -> Changes:
    """Return the longest rows that fit, in eighths of what is asked; half where none does."""
    # Multiples of 8, because the lines of a batch are rounded up to those; the fourth is the half.
    lengths = [max(8, recipe.data.max_length * eighths // 64 * 8) for eighths in range(7, 0, -1)]
    tried: list[Changes] = [{"data.max_length": length} for length in lengths]
    return next((changes for changes in tried if peak(_changed(recipe, changes)) <= limit), tried[3])


def _smaller_adapters(case: Case) -> list[Changes]:
    config = MixtureConfig.from_recipe(case.recipe.adapter, len(case.recipe.data.tasks))
    changes: list[Changes] = [{"adapter.rank": max(1, (config.rank or 1) // 2)}]
    kinds = {linear.name.rpartition(".")[2] for linear in case.shapes.linears}
    asked = set(config.target_modules or ())
    if config.target_modules == "all-linear":
        asked = kinds
    few = {"q_proj", "v_proj"}
    if few < asked and few <= kinds:
        changes.append({"adapter.targets": sorted(few)})
    return changes


def _changed(recipe: Recipe, changes: Changes) -> Recipe:
    for key, value in changes.items():
        section, name = key.split(".", 1)
        recipe = recipe.model_copy(update={section: _with(getattr(recipe, section), name.split("."), value)})
    return recipe


def _with(section: Section, path: list[str], value: object) -> Section:
    name, *rest = path
    if rest:
        value = _with(getattr(section, name), rest, value)
    return section.model_copy(update={name: value})


def _as_overrides(changes: Changes) -> str:
    """Write changes as a command line takes them."""
    plain = {key: json.dumps(value, separators=(",", ":")).replace('"', "") for key, value in changes.items()}
    return " ".join(f"{key}={value}" for key, value in plain.items())


__all__ = ["ways_out"]
