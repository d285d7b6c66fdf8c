"""The plan: what the recipe leaves open, chosen for the fastest run that fits the memory, with the reason for each."""

import json
import re
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from transformers import AutoConfig, PreTrainedConfig

from qd2mora.base.device import has_flash_attention
from qd2mora.base.host_memory import available_bytes
from qd2mora.base.loading import planning_config
from qd2mora.errors import InputRefused
from qd2mora.memory.choosing import Search
from qd2mora.memory.ledger import CHECKPOINT_COPY, ledger
from qd2mora.memory.place import Limit, Place
from qd2mora.memory.reasons import Choice, reasons
from qd2mora.memory.shapes import Shapes, read_shapes
from qd2mora.memory.techniques import Case, Layout
from qd2mora.memory.ways_out import ways_out
from qd2mora.mixture import MixtureConfig
from qd2mora.recipe import Adapter, Recipe
from qd2mora.recipe.memory import SIZE, SIZE_UNITS
from qd2mora.recipe.objective import HEAD_WIDTH


@dataclass(frozen=True)
class Plan:
    """The memory of a run in bytes, and what was chosen.

    `items` are alive at the peak and sum up to it; `elsewhere` are the items of a step's other moments. Where nothing
    fits, this is the smallest plan, and `ways_out` are changes of the recipe with what they save.
    """

    items: dict[str, int]
    elsewhere: dict[str, int]
    host: dict[str, int]
    """Bytes in host memory that go with a plan for a GPU."""
    choices: dict[str, Choice]
    layout: Layout
    trainable_parameters: int
    budget_bytes: int | None
    budget_source: str
    reserve_bytes: int
    """What of the budget is left free."""
    device: str
    """What it is planned for."""
    ways_out: tuple[str, ...] = ()
    host_free_bytes: int | None = None
    """What is free in the host memory beside a GPU that is here."""

    @property
    def micro_batch(self) -> int:
        """Rows in one forward pass."""
        return self.layout.micro_batch

    @property
    def checkpointing(self) -> bool:
        """Whether any layer is recomputed."""
        return self.layout.recomputed > 0

    @property
    def peak_bytes(self) -> int:
        """The most that is alive at once."""
        return sum(self.items.values())

    @property
    def shortfall_bytes(self) -> int:
        """How far peak and reserve are above the budget; 0 where they fit."""
        if self.budget_bytes is None:
            return 0
        return max(0, self.peak_bytes + self.reserve_bytes - self.budget_bytes)

    @property
    def host_bytes(self) -> int:
        """What host memory must hold; a checkpoint's copy is made only where there is room for it."""
        return sum(size for name, size in self.host.items() if name != CHECKPOINT_COPY)

    @property
    def host_shortfall_bytes(self) -> int:
        """How far that is above what is free there; 0 where it fits, or is not known."""
        if self.host_free_bytes is None:
            return 0
        return max(0, self.host_bytes - self.host_free_bytes)

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the reserve of the budget, or there is none, and the host has room for its part."""
        return self.shortfall_bytes == 0 and self.host_shortfall_bytes == 0

    def to_json(self) -> dict[str, object]:
        """Return what `plan --json` prints."""
        return {
            "device": self.device,
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
            "budget_bytes": self.budget_bytes,
            "budget_source": self.budget_source,
            "reserve_bytes": self.reserve_bytes,
            "shortfall_bytes": self.shortfall_bytes,
            "items": self.items,
            "elsewhere": self.elsewhere,
            "host": self.host,
            "host_free_bytes": self.host_free_bytes,
            "choices": {key: {"value": choice.value, "reason": choice.reason} for key, choice in self.choices.items()},
            "trainable_parameters": self.trainable_parameters,
            "ways_out": list(self.ways_out),
        }


def plan(
    recipe: Recipe, budget: str | int | None = None, device: torch.device | None = None, agreed: int | None = None
) -> Plan:
    """Plan a run for a budget (bytes or "8GiB"; else the recipe's, else what is free there), reading no weights.

    Without a `device` the one that is here is planned for, but a GPU where a budget is named: that of another machine
    computes in bfloat16 unless the recipe says otherwise, a CPU in float32. A reserve is left of the budget. Rows are
    taken to be `data.max_length` long. `agreed` is what is free on the fullest device of several processes.

    Raises InputRefused.
    """
    place = Place.of(device, budget is not None or recipe.memory.budget is not None, agreed)
    limit = _limit(recipe, budget, place)
    config = planning_config(recipe.base)
    search = _search(recipe, place, config)
    # Free memory changes from start to start; on a CPU it decides what is recomputed, and the adapter stays the same.
    chosen, is_within = search.choose(limit.usable, keeps_batch=limit.is_found and not place.on_gpu)
    written = ledger(search.case.shapes, recipe, chosen, search.texts(chosen, limit.usable))
    ways: tuple[str, ...] = ()
    if limit.usable is not None and not is_within:
        ways = ways_out(search, limit.usable, written.peak_bytes, lambda changed: _search(changed, place, config))
    return Plan(
        items=written.items,
        elsewhere=written.elsewhere,
        host=written.host,
        choices=reasons(search, chosen, limit, is_within),
        layout=chosen,
        trainable_parameters=sum(search.case.shapes.trainable),
        budget_bytes=limit.size,
        budget_source=limit.source,
        reserve_bytes=limit.reserve,
        device=place.name,
        ways_out=ways,
        host_free_bytes=_host_room(place),
    )


def parse_size(text: str) -> int:
    """Return the bytes of "8GiB", "500 MB" and the like. Raises InputRefused."""
    size = text.strip()
    match = re.fullmatch(SIZE, size, re.ASCII)
    if not match:
        raise InputRefused(
            f"budget: '{text}' will not do: a number and a unit ({', '.join(SIZE_UNITS)}), for example 8GiB"
        )
    unit = match[2]
    return int(float(size.removesuffix(unit)) * SIZE_UNITS[unit])


def _limit(recipe: Recipe, budget: str | int | None, place: Place) -> Limit:
    if isinstance(budget, str):
        return Limit.of_budget(parse_size(budget), "the budget given", place)
    if budget is not None:
        return Limit.of_budget(budget, "the budget given", place)
    if recipe.memory.budget is not None:
        return Limit.of_budget(parse_size(recipe.memory.budget), "memory.budget", place)
    return Limit.of_free(place)


def _host_room(place: Place) -> int | None:
    """Return what the host has free, where a GPU that is here leaves something to it."""
    if not place.on_gpu or not place.is_here:
        return None
    return available_bytes()


def _shapes(recipe: Recipe, config: PreTrainedConfig) -> Shapes:
    shapes = _built(
        config.to_json_string(use_diff=False),
        recipe.adapter.model_dump_json(exclude_unset=True),
        len(recipe.data.tasks),
        recipe.train.routing.top_k if recipe.train.routing is not None else None,
    )
    return shapes if recipe.objective.kind != "reward" else _with_head(shapes, recipe)


def _with_head(shapes: Shapes, recipe: Recipe) -> Shapes:
    """Add the head of a reward model; over experts it alone is trained, and no gradient passes the adapter."""
    over, hidden = recipe.tasks_over_experts, shapes.layer.hidden
    if over is None:
        return replace(shapes, trainable=(*shapes.trainable, hidden))
    experts = MixtureConfig.from_recipe(recipe.adapter, len(recipe.data.tasks)).num_tasks or 1
    of_network = (over * HEAD_WIDTH * experts, over * HEAD_WIDTH, over, over * HEAD_WIDTH)
    return replace(shapes, trainable=of_network, still=sum(shapes.trainable) + hidden)


@lru_cache(maxsize=16)
def _built(config: str, adapter: str, num_tasks: int, first_top_k: int | None) -> Shapes:
    """Take a second or so for a 7B; a plan, its ways out and training ask for the same."""
    mixture = MixtureConfig.from_recipe(Adapter.model_validate_json(adapter), num_tasks)
    # Through JSON: configurations have no hash that tells what they hold, by which a cache could find them.
    content = json.loads(config)
    return read_shapes(AutoConfig.for_model(content.pop("model_type"), **content), mixture, first_top_k)


def _search(recipe: Recipe, place: Place, config: PreTrainedConfig) -> Search:
    dtype = place.dtype(recipe)
    return Search(Case(_shapes(recipe, config), recipe, dtype, place.on_gpu, _masks(recipe, place, dtype, config)))


def _masks(recipe: Recipe, place: Place, dtype: torch.dtype, config: PreTrainedConfig) -> bool:
    """Tell whether training's attention is given a mask; of a card that is not here it is taken to be.

    Packed lines and windows that slide have masks of their own, which are not of padding alone.
    """
    if not (place.is_here and has_flash_attention(place.device, dtype)) or recipe.data.packing:
        return True
    return bool(getattr(config, "sliding_window", None))


__all__ = ["Plan", "parse_size", "plan"]
