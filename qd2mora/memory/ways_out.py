"""Ways out: what to change where no plan fits the budget, the cheapest to the user first."""

import json
from collections.abc import Callable
from typing import Any

from qd2mora.memory.choosing import GIB, SMALL_CHUNK, Search
from qd2mora.mixture import MixtureConfig
from qd2mora.recipe import Recipe

LEAST_SAVING = 1 << 20

Changes = dict[str, Any]
"""Dotted key to value, as overrides of a recipe."""


def ways_out(search: Search, limit: int, smallest: int, search_of: Callable[[Recipe], Search]) -> tuple[str, ...]:
    """Name up to three changes with what each saves of the `smallest` peak and whether it is enough."""
    recipe = search.recipe

    def peak(changed: Recipe) -> int:
        there = Search(search.shapes, changed, search.dtype, search.on_gpu)
        now = there if changed.adapter == recipe.adapter else search_of(changed)
        return now.peak(now.choose(limit)[0])

    ways, together = [], recipe
    for changes in [*_exact_changes(search), _shorter(recipe, peak, limit), *_smaller_adapters(search)]:
        now = peak(_changed(recipe, changes))
        saved = smallest - now
        if saved >= LEAST_SAVING:
            enough = "enough" if now <= limit else "not enough alone"
            ways.append((now > limit, f"{_as_overrides(changes)} saves {saved / GIB:.2f} GiB, {enough}"))
            together = _changed(together, changes)
    least = peak(together)
    if least > limit:
        needs = f"all savings known here together still need {least / GIB:.2f} GiB: a smaller base or a larger card"
        return (*(words for _, words in ways[:2]), needs)
    ways.sort(key=lambda way: way[0])
    return tuple(words for _, words in ways[:3])


def _exact_changes(search: Search) -> list[Changes]:
    """Return what leaves the learning as it is, or nearly: by what it costs in speed, then in precision."""
    offload: list[Changes] = []
    if search.on_gpu and search.shapes.head_entries:
        offload.append({"memory.offload.embeddings": "cpu"})
    if search.on_gpu and search.recipe.memory.checkpointing != "off":
        offload.append({"memory.offload.activations": "cpu"})
    return [
        {"memory.loss_chunk": SMALL_CHUNK},
        *offload,
        {"train.micro_batch": 1},
        {"memory.checkpointing": "on"},
        {"train.optimizer": "adamw_8bit"},
        *([{"memory.offload.weights": "auto"}] if search.on_gpu else []),
        {"base.double_quant": True},
        {"base.quantization": "nf4"},
    ]


def _shorter(recipe: Recipe, peak: Callable[[Recipe], int], limit: int) -> Changes:
    """Return the longest rows that fit, in eighths of what is asked; half where none does."""
    lengths = [max(8, recipe.data.max_length * eighths // 64 * 8) for eighths in range(7, 0, -1)]
    tried: list[Changes] = [{"data.max_length": length} for length in lengths]
    return next((changes for changes in tried if peak(_changed(recipe, changes)) <= limit), tried[3])


def _smaller_adapters(search: Search) -> list[Changes]:
    recipe = search.recipe
    config = MixtureConfig.from_recipe(recipe.adapter, len(recipe.data.tasks))
    changes: list[Changes] = [{"adapter.rank": max(1, (config.rank or 1) // 2)}]
    kinds = {linear.name.rpartition(".")[2] for linear in search.shapes.linears}
    asked = kinds if config.target_modules == "all-linear" else set(config.target_modules or ())
    few = {"q_proj", "v_proj"}
    return [*changes, {"adapter.targets": sorted(few)}] if few < asked and few <= kinds else changes


def _changed(recipe: Recipe, changes: Changes) -> Recipe:
    for key, value in changes.items():
        recipe = _with(recipe, key.split("."), value)
    return recipe


def _with(section: Any, path: list[str], value: Any) -> Any:
    new = value if len(path) == 1 else _with(getattr(section, path[0]), path[1:], value)
    return section.model_copy(update={path[0]: new})


def _as_overrides(changes: Changes) -> str:
    """Write changes as a command line takes them."""
    plain = {key: json.dumps(value, separators=(",", ":")).replace('"', "") for key, value in changes.items()}
    return " ".join(f"{key}={value}" for key, value in plain.items())


__all__ = ["ways_out"]
