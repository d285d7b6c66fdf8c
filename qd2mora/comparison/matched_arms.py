"""Arms of equal size: each method's rank is solved for, so that all train as many parameters as the recipe's adapter.

The scaling alpha / rank stays the recipe's. Where no rank of a method's own number of experts comes within the limit,
as on narrow models, the nearest number of experts does that.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qd2mora.base import base_config
from qd2mora.errors import InputRefused
from qd2mora.mixture import MixtureConfig
from qd2mora.mixture.counts import llama_linears, trainable_parameters
from qd2mora.mixture.method import Method
from qd2mora.mixture.presets import find_method
from qd2mora.recipe import Adapter, Experts, Recipe

LIMIT = 0.02
MAX_RANK = 4096


@dataclass(frozen=True)
class Arm:
    """A method at a size."""

    name: str
    adapter: Adapter
    parameters: int


def matched_arms(recipe: Recipe, methods: list[str]) -> list[Arm]:
    """Return an arm for each method, within LIMIT of the recipe's own adapter. Raises InputRefused.

    The recipe's own method is taken as it stands there.
    """
    count = _Counter(recipe)
    wanted = count(recipe.adapter)
    arms = []
    for name in methods:
        row = find_method(name)
        if name == recipe.adapter.method:
            adapter = recipe.adapter
        else:
            _refuse_unmatched(row)
            adapter = _nearest(recipe, row, count, wanted)
        arms.append(Arm(name, adapter, count(adapter)))
    return arms


class _Counter:
    """Counts what an adapter trains on the recipe's base, from sizes alone."""

    def __init__(self, recipe: Recipe) -> None:
        config: Any = base_config(recipe.base)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.hidden, self.layers = config.hidden_size, config.num_hidden_layers
        self.linears = llama_linears(
            self.hidden,
            config.intermediate_size,
            width * config.num_attention_heads,
            width * config.num_key_value_heads,
        )
        self.num_tasks = len(recipe.data.tasks)

    def __call__(self, adapter: Adapter) -> int:
        config = MixtureConfig.from_recipe(adapter, self.num_tasks)
        return trainable_parameters(config, self.linears, self.layers, self.hidden)


def _nearest(recipe: Recipe, row: Method, count: _Counter, wanted: int) -> Adapter:
    """Return the method's adapter whose count is nearest; the first number of experts within the limit is taken."""
    own = MixtureConfig.from_recipe(recipe.adapter, len(recipe.data.tasks))
    assert own.rank is not None and own.alpha is not None
    targets = own.target_modules if isinstance(own.target_modules, str) else sorted(own.target_modules or ())
    shared: dict[str, Any] = {
        "method": row.name,
        "targets": targets,
        "dropout": recipe.adapter.dropout,
        "rank_stabilized": recipe.adapter.rank_stabilized,
        "external_width": recipe.adapter.external_width if row.gates.reads_vector else None,
    }
    # The method's own number of experts is kept where a rank of it comes near enough: it is part of the method.
    best: Adapter | None = None
    for experts in _numbers_of_experts(row):
        adapter = Adapter(**(shared | experts))
        solved = _with_rank(adapter, own.alpha / own.rank, count, wanted)
        if best is None or abs(count(solved) - wanted) < abs(count(best) - wanted):
            best = solved
        if abs(count(best) - wanted) <= LIMIT * wanted:
            return best
    assert best is not None
    raise InputRefused(
        f"--methods: {row.name} comes no nearer to the recipe's {wanted:,} trainable parameters than "
        f"{count(best):,} (rank {best.rank}); change adapter.rank"
    )


def _with_rank(adapter: Adapter, ratio: float, count: _Counter, wanted: int) -> Adapter:
    def at(rank: int) -> Adapter:
        return adapter.model_copy(update={"rank": rank, "alpha": ratio * rank})

    # What an adapter trains grows with its rank, so that halving finds the two ranks about the wanted number.
    low, high = 1, MAX_RANK
    while high - low > 1:
        middle = (low + high) // 2
        if count(at(middle)) <= wanted:
            low = middle
        else:
            high = middle
    return min((at(low), at(high)), key=lambda each: abs(count(each) - wanted))


def _numbers_of_experts(row: Method) -> Iterator[dict[str, Experts]]:
    """Yield expert counts, the method's own first, then its neighbours."""
    yield {}
    # Pairs share one number of experts on both sides.
    tied = row.pairing == "tied" and row.down > 1
    for step in range(1, 9):
        for change in (-step, step):
            down, up = (max(2, number + change) for number in (row.down, row.up))
            if tied:
                yield {"down": Experts(experts=down), "up": Experts(experts=down)}
            elif row.gate_up is not None:
                yield {"up": Experts(experts=up)}
            elif row.gate_down is not None:
                yield {"down": Experts(experts=down)}


def _refuse_unmatched(row: Method) -> None:
    if row.given == "needed":
        raise InputRefused(f"--methods: {row.name} starts from trained LoRAs; it cannot be matched by rank")
    if row.ranks is not None or row.scales:
        raise InputRefused(f"--methods: {row.name} has a rank for each expert; it cannot be matched by one")


__all__ = ["LIMIT", "Arm", "matched_arms"]
