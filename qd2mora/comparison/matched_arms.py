"""Arms of equal size: each method's rank is solved for, so that all train as many parameters as the recipe's adapter.

An arm is its method as its authors run it: its own linears where it names some (`Method.targets`; the recipe's for
those that have none of their own, or for all with `--targets recipe`), its own scale of the update, and as large a part
of its ranks in use where it chooses among them. Where no rank comes within the limit, the method's number of experts
changes: the nearest number that does is taken. An arm whose routing would vanish on its linears is refused by name.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qd2mora.base import base_config
from qd2mora.comparison.arms_file import Wish, wish_of
from qd2mora.comparison.settings import Linears
from qd2mora.errors import InputRefused
from qd2mora.mixture import MixtureConfig
from qd2mora.mixture.counts import llama_linears, routed_linears, trainable_parameters
from qd2mora.mixture.method import Method
from qd2mora.mixture.presets import find_method
from qd2mora.recipe import Adapter, Experts, Recipe
from qd2mora.recipe.adapter import GateFields, Shared
from qd2mora.routed.gate import Role

LIMIT, COARSE = 0.02, 0.1
"""How far from the recipe's parameters an arm may be, and where a step of its rank is wider than that."""
MAX_RANK = 4096
PLAIN = ("q_proj", "k_proj", "v_proj")
"""Linears of the rows that have none of their own: D2MoRA's Table 1 puts those methods on them."""


@dataclass(frozen=True)
class Arm:
    """A method at a size; `train`: settings of training that are its own; `notes`: what was chosen for it."""

    name: str
    adapter: Adapter
    parameters: int
    train: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def matched_arms(
    recipe: Recipe, methods: list[str], arms: Mapping[str, Wish] | None = None, targets: Linears = "own"
) -> list[Arm]:
    """Return an arm for each method, or arm of `arms`, within LIMIT of the recipe's own adapter. Raises InputRefused.

    The recipe's own method is taken as it stands there.
    """
    count = _Counter(recipe)
    wanted = count(recipe.adapter)
    found = []
    for name in methods:
        wish = wish_of(name, arms or {})
        if name == recipe.adapter.method and name not in (arms or {}):
            adapter = recipe.adapter
        else:
            adapter = _Matching(name, wish, recipe, count, wanted, targets).adapter()
        count.refuse_unrouted(name, adapter)
        found.append(Arm(name, adapter, count(adapter), wish.train, tuple(_notes(recipe, adapter, count, wanted))))
    return found


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
        return trainable_parameters(self.config(adapter), self.linears, self.layers, self.hidden)

    def config(self, adapter: Adapter) -> MixtureConfig:
        """Return the configuration that a recipe's section makes."""
        return MixtureConfig.from_recipe(adapter, self.num_tasks)

    def refuse_unrouted(self, name: str, adapter: Adapter) -> None:
        """Refuse a mixture that none of its linears would have: it would be one LoRA under another name."""
        config = self.config(adapter)
        if config.routers and not routed_linears(config, self.linears, self.layers, self.hidden):
            there = ", ".join(sorted(_targets(config)))
            raise InputRefused(
                f"--methods: {name} has no routed expert on {there}: it would be one LoRA; its own are "
                f"{', '.join(config.row.targets)}"
            )


@dataclass(frozen=True)
class _Matching:
    """One arm's size being found."""

    name: str
    wish: Wish
    recipe: Recipe
    count: _Counter
    wanted: int
    targets: Linears

    @property
    def row(self) -> Method:
        return find_method(self.wish.method)

    def adapter(self) -> Adapter:
        """Return the adapter whose count is nearest; the first number of experts within the limit is taken."""
        self._refuse_unmatched()
        best: Adapter | None = None
        # The method's own number of experts is kept where a rank of it comes near enough: it is part of the method.
        for experts in _numbers_of_experts(self.row, self.wish, self.count.layers):
            solved = self._with_rank(Adapter(**(self._shared_settings() | experts)))
            if best is None or self._distance(solved) < self._distance(best):
                best = solved
            if self._distance(best) <= LIMIT:
                return best
        assert best is not None
        if "rank" in self.wish.given or (self._distance(best) <= COARSE and self._is_coarse(best)):
            return best
        raise InputRefused(
            f"--methods: {self.name} comes no nearer to the recipe's {self.wanted:,} trainable parameters than "
            f"{self.count(best):,} (rank {best.rank}); change adapter.rank"
        )

    def _shared_settings(self) -> dict[str, Any]:
        recipe, row = self.recipe.adapter, self.row
        targets = _targets(self.count.config(recipe))
        if self.targets == "own" and row.targets != PLAIN:
            targets = row.targets
        settings: dict[str, Any] = {
            "method": row.name,
            "targets": list(targets) if not isinstance(targets, str) else targets,
            "dropout": recipe.dropout,
            "rank_stabilized": recipe.rank_stabilized,
            "external_width": recipe.external_width if row.gates.reads_vector else None,
        }
        return settings | self.wish.given

    def _distance(self, adapter: Adapter) -> float:
        return abs(self.count(adapter) - self.wanted) / self.wanted

    def _is_coarse(self, adapter: Adapter) -> bool:
        """Whether a step of the rank is wider than the limit on both sides together: no rank can come within it."""
        assert adapter.rank is not None
        return self.count(self._at(adapter, adapter.rank + 1)) - self.count(adapter) > 2 * LIMIT * self.wanted

    def _with_rank(self, adapter: Adapter) -> Adapter:
        if adapter.rank is not None:
            return self._at(adapter, adapter.rank)
        # What an adapter trains grows with its rank, so that halving finds the two ranks about the wanted number.
        low, high = 1, MAX_RANK
        while high - low > 1:
            middle = (low + high) // 2
            if self.count(self._at(adapter, middle)) <= self.wanted:
                low = middle
            else:
                high = middle
        return min((self._at(adapter, low), self._at(adapter, high)), key=self._distance)

    def _at(self, adapter: Adapter, rank: int) -> Adapter:
        """Return the adapter at a rank, with its method's part of ranks in use, and the scale that it is to have."""
        changes: dict[str, Any] = {"rank": rank, "gates": _gates_at(self.row, adapter, rank)}
        if self.row.ranks is not None:
            changes["ranks"] = _ranks_at(self.row.ranks, rank)
        scale = self.wish.scale or self.row.scaling
        if self.wish.shared_part is not None:
            changes["shared"] = self._shared(adapter, scale)
        unit = adapter.model_copy(update=changes | {"alpha": 1.0, "rank_stabilized": False})
        if self.row.has_fixed_alpha and self.wish.scale is None:
            return adapter.model_copy(update=changes | {"alpha": self.row.alpha, "rank_stabilized": False})
        # With alpha 1 the scale is one over what alpha is divided by.
        return adapter.model_copy(update=changes | {"alpha": scale / self.count.config(unit).scaling})

    def _shared(self, adapter: Adapter, scale: float) -> Shared:
        """Return the shared expert that has its part of the parameters, at the scale of the others."""
        own = adapter.shared
        assert own is not None and self.wish.shared_part is not None

        def counted(rank: int) -> int:
            shared, gates = own.model_copy(update={"rank": rank}), _gates_at(self.row, adapter, 1)
            return self.count(adapter.model_copy(update={"rank": 1, "gates": gates, "shared": shared}))

        # By the difference, in which all else that the adapter trains falls out.
        of_a_rank = counted(2) - counted(1)
        rank = max(1, round(self.wish.shared_part * self.wanted / of_a_rank))
        return own.model_copy(update={"rank": rank, "alpha": scale * rank})

    def _refuse_unmatched(self) -> None:
        if self.row.given == "needed":
            raise InputRefused(f"--methods: {self.name} starts from trained LoRAs; it cannot be matched by rank")
        if "ranks" in self.wish.given:
            raise InputRefused(f"--methods: {self.name} has a rank for each expert; it cannot be matched by one")


def _ranks_at(ranks: tuple[int, ...], largest: int) -> list[int]:
    """Return ranks in the proportions that a method has them, the largest being what is said; 0 stays 0."""
    return [max(1, round(rank * largest / max(ranks))) if rank else 0 for rank in ranks]


def _gates_at(row: Method, adapter: Adapter, rank: int) -> Mapping[Role, Any] | None:
    """Return the changes of gates that a rank asks for: of those who choose among ranks, k stays the same part."""
    gate, told = row.gate_rank, dict(adapter.gates or {})
    if gate is None or gate.top_k is None:
        return told or None
    own: Any = told.get("rank") or GateFields()
    if own.top_k is None:
        told["rank"] = own.model_copy(update={"top_k": max(1, math.floor(gate.top_k / row.rank * rank + 0.5))})
    return told


def _numbers_of_experts(row: Method, wish: Wish, num_layers: int) -> Iterator[dict[str, Any]]:
    """Yield expert counts, the method's own first, then its neighbours; alone where the arm says or has none."""
    if {"down", "up", "allocation"} & set(wish.given):
        yield {}
        return
    if row.allocation is not None:
        yield from ({"allocation": each} for each in _allocations(row, num_layers))
        return
    yield {}
    # Pairs share one number of experts on both sides; a single pair stays one, experts of a scale or rank each stay so.
    tied = row.pairing == "tied"
    if (tied and row.down == 1) or row.scales or row.ranks:
        return
    for step in range(1, 9):
        for change in (-step, step):
            down, up = (max(2, number + change) for number in (row.down, row.up))
            if tied:
                yield {"down": Experts(experts=down), "up": Experts(experts=down)}
            elif row.gate_up is not None:
                yield {"up": Experts(experts=up)}
            elif row.gate_down is not None:
                yield {"down": Experts(experts=down)}


def _allocations(row: Method, num_layers: int) -> list[str]:
    """Return a method's allocation, and its shape with fewer and fewer experts: at least as many as a token uses."""
    groups = _groups_for(row.allocation or "", num_layers)
    least = row.gate_down.top_k or 1 if row.gate_down is not None else 1
    found: dict[str, None] = {}
    for total in range(sum(groups), 0, -1):
        found["-".join(str(max(least, round(group * total / sum(groups)))) for group in groups)] = None
    return list(found)


def _groups_for(allocation: str, num_layers: int) -> list[int]:
    """Return an allocation's groups, as many as there are layers at most: means of neighbours where it has more."""
    groups = [int(part) for part in allocation.split("-")]
    if len(groups) <= num_layers:
        return groups
    # Every group as long as there are layers, cut into layers as long as there are groups.
    stretched = [group for group in groups for _ in range(num_layers)]
    parts = [stretched[place : place + len(groups)] for place in range(0, len(stretched), len(groups))]
    return [round(sum(part) / len(part)) for part in parts]


def _targets(config: MixtureConfig) -> str | tuple[str, ...]:
    targets = config.target_modules
    return targets if isinstance(targets, str) else tuple(sorted(targets or ()))


def _notes(recipe: Recipe, adapter: Adapter, count: _Counter, wanted: int) -> Iterator[str]:
    """Yield what is not the recipe's: the linears, and the size where no rank comes within the limit."""
    own, its = _targets(count.config(recipe.adapter)), _targets(count.config(adapter))
    if set(own) != set(its):
        yield f"on its own linears: {', '.join(its) if not isinstance(its, str) else its}"
    away = count(adapter) / wanted - 1
    if abs(away) > LIMIT:
        yield f"{abs(away):.1%} {'fewer' if away < 0 else 'more'} parameters than the first"


__all__ = ["COARSE", "LIMIT", "Arm", "matched_arms"]
