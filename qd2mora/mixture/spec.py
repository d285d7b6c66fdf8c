"""One adapted linear, resolved: which tensors it has, what its step in rank space is, what is trained.

A configuration describes all linears; where a linear stands (its layer, its block) decides how many experts it gets,
and whether it owns the router that its block or the model shares.
"""

import re
from dataclasses import dataclass

from qd2mora.mixture.config import MixtureConfig
from qd2mora.mixture.method import Penalty, experts_by_layer
from qd2mora.mixture.phases import PLAIN, Phase, step_in
from qd2mora.routed.gate import Gate
from qd2mora.routed.ops import RankStep


@dataclass(frozen=True)
class Place:
    """Where a linear stands: its name in the model, its sizes, how deep the model is, what the hidden width is."""

    key: str
    d_in: int
    d_out: int
    num_layers: int = 1
    hidden: int = 0
    owns_router: bool = True

    @property
    def layer(self) -> int:
        """The decoder layer, 0 where the name tells none."""
        # Dots at both ends, so that a number at the name's beginning or end is found as well.
        found = re.search(r"\.(\d+)\.", f".{self.key}.")
        return int(found[1]) if found else 0

    @property
    def height(self) -> float:
        """How high the layer stands among all, from 0 to 1; 1 where there is one."""
        return self.layer / (self.num_layers - 1) if self.num_layers > 1 else 1.0

    @property
    def kind(self) -> str:
        """The last part of the name, such as q_proj."""
        return self.key.rpartition(".")[2]

    def scope_key(self, scope: str) -> str:
        """Name what a router of this scope serves."""
        # A block is what the linear hangs in, self_attn or mlp: q, k, v and o share one router, gate, up and down
        # another.
        return self.key if scope == "module" else self.key.rpartition(".")[0]


@dataclass(frozen=True)
class LinearSpec:
    """What one linear has: `shapes` of its tensors, those `frozen`, its step, its scale, its routing penalties.

    counts: experts that a router of each role chooses among. num_tasks: tasks known to routers that read the task.
    """

    place: Place
    step: RankStep
    shapes: dict[str, tuple[int, ...]]
    frozen: tuple[str, ...]
    scaling: float
    penalties: tuple[Penalty, ...]
    counts: dict[str, int]
    num_tasks: int

    def gate(self, role: str) -> Gate | None:
        """Return the gate of a role where it is not constant."""
        return dict(self.step.gates).get(role)

    @property
    def pools(self) -> bool:
        """Whether a penalty needs to know in the backward pass what routers decided in the forward pass."""
        return any(each.pool != "router" for each in self.penalties)

    def step_in(self, phase: Phase) -> RankStep:
        """Return the step as it is in a phase of training."""
        is_plain = phase == PLAIN and all(gate.weight != "soft" for _, gate in self.step.gates)
        return self.step if is_plain else step_in(self.step, phase, tuple(self.counts.items()), self.place.height)


def linear_spec(config: MixtureConfig, place: Place) -> LinearSpec:
    """Resolve a configuration for one linear. Raises InputRefused."""
    row, experts = config.row, _experts(config, place)
    counts = row.experts_of(experts.down, experts.up, experts.ranks[0], config.num_cores)
    # Among one expert there is nothing to choose: such a bank has no router.
    gates = {role: gate for role, gate in config.routers.items() if not gate.is_constant(counts[role])}
    shapes = _bank_shapes(config, place, experts)
    rows: list[tuple[str, int]] = []
    for role, gate in gates.items():
        found = _router_shapes(config, place, role, gate, counts[role])
        shapes |= found
        # Its rows stand in u, in the order of roles: the layer, the kernels and the exact export all count on that
        # order.
        if gate.reads_x:
            rows.append((role, found[f"mixture_router_{role}"][0]))
    scaling = config.scaling_of(experts.ranks, _rank_of_one(config, place))
    step = RankStep(
        ranks_down=experts.ranks,
        ranks_up=experts.ranks_up,
        pairing=row.pairing,
        core=row.core,
        gates=tuple(gates.items()),
        router_rows=tuple(rows),
        scales=row.scales,
        shared=config.shared_rank * len(config.shared_banks),
        # The whole update is multiplied by s at the end; the shared expert has a scale of its own.
        shared_scaling=config.shared_scaling / scaling,
    )
    frozen = tuple(name for name in shapes if name in config.frozen_tensors)
    num_tasks = config.num_tasks or 0
    return LinearSpec(place, step, shapes, frozen, scaling, config.routing_penalties, counts, num_tasks)


@dataclass(frozen=True)
class _Experts:
    """The experts of one linear, and the ranks of its down and of its up experts."""

    down: int
    up: int
    ranks: tuple[int, ...]
    ranks_up: tuple[int, ...]


def _experts(config: MixtureConfig, place: Place) -> _Experts:
    row, rank = config.row, config.rank
    assert rank is not None
    down, up = config.num_down, config.num_up
    # MixLoRA and LLaVA-MoLE route MLPs alone: attention gets one ungated pair, which is a plain LoRA.
    if place.kind in row.one_expert:
        down = up = 1
        rank = _rank_of_one(config, place) or rank
    elif config.allocation is not None:
        # A model that does not tell its depth has at least the layer that this linear stands in.
        up = experts_by_layer(config.allocation, max(place.num_layers, place.layer + 1))[place.layer]
        if row.pairing == "tied":
            down = up
    if row.pairing == "chain":
        # z = sum_i alpha_i A_i x is one code that every B_j reads, so chained banks have one rank on both sides.
        return _Experts(down, up, (rank,) * down, (rank,) * up)
    ranks = (rank,) * down
    # A list of ranks is for all experts; a linear that has one expert (`one_expert`) takes the plain rank.
    if config.ranks is not None and down == len(config.ranks):
        ranks = tuple(config.ranks)
    elif row.core == "kron":
        # The seed of rank r unfolded at scale s has r s ranks: B_e C_e A_e with A_e = A[:, :D/s] (x) I_s.
        ranks = tuple(rank * scale for scale in row.scales)
    return _Experts(down, up, ranks, ranks)


def _rank_of_one(config: MixtureConfig, place: Place) -> int | None:
    """Return the rank of a linear with one expert, where that has one of its own (MixLoRA's attention)."""
    return config.attention_rank if place.kind in config.row.one_expert else None


def _bank_shapes(config: MixtureConfig, place: Place, experts: _Experts) -> dict[str, tuple[int, ...]]:
    row, rank, ranks = config.row, config.rank, experts.ranks
    assert rank is not None
    shapes: dict[str, tuple[int, ...]]
    if row.core == "kron":
        # One seed for all scales, unfolded anew in each pass (`ops.kron_banks`); the kernels K_e lie flat, one after
        # another.
        shapes = {"mixture_A": (1, rank, place.d_in), "mixture_B": (1, place.d_out, rank)}
        shapes["mixture_core"] = (sum(scale * scale for scale in row.scales),)
        return shapes
    if len(set(ranks)) > 1:
        # No axis of experts where they differ in size: rows of A and columns of B, expert after expert.
        shapes = {"mixture_A": (sum(ranks), place.d_in), "mixture_B": (place.d_out, sum(ranks))}
    else:
        shapes = {"mixture_A": (experts.down, ranks[0], place.d_in), "mixture_B": (experts.up, place.d_out, ranks[0])}
    if row.core != "none":
        number = config.num_cores
        wide = dict.fromkeys(("bank", "residual"), (number, rank, rank))
        flat = dict.fromkeys(("diagonal", "residual_diagonal"), (number, rank))
        shapes["mixture_core"] = {"dense": (rank, rank), **wide, **flat}[row.core]
    for name in config.shared_banks:
        shapes[f"mixture_{name}_A"] = (config.shared_rank, place.d_in)
        shapes[f"mixture_{name}_B"] = (place.d_out, config.shared_rank)
    if config.experts == "dora":
        shapes["mixture_magnitude"] = (experts.down, place.d_out)
    if row.base_scale:
        shapes["mixture_base_scale"] = (1,)
    return shapes


def _router_shapes(config: MixtureConfig, place: Place, role: str, gate: Gate, num: int) -> dict[str, tuple[int, ...]]:
    assert config.rank is not None
    shapes: dict[str, tuple[int, ...]] = {}
    if gate.has_moved_bias:
        shapes[f"mixture_select_bias_{role}"] = (num,)
    # A load bias steers this linear's choice; the router itself stands in the first linear of its scope.
    if gate.scope != "module" and not place.owns_router:
        return shapes
    if gate.input == "none":
        # Where nothing is read, the logits themselves are trained: CAT's weights, ScaleZero's scales.
        return shapes | {f"mixture_logits_{role}": (num,)}
    if gate.input == "span" and gate.select != "fixed":
        # A row of logits for each mark; there are as many marks as experts.
        return shapes | {f"mixture_logits_{role}": (num, num)}
    if gate.input == "self" or gate.select == "fixed":
        return shapes  # ranks score themselves, and a task's number is its expert
    if gate.input in ("task", "task+x"):
        width = config.task_embedding
        assert config.num_tasks is not None and width is not None
        # One row more than tasks, as in the authors' code.
        shapes["mixture_task_embedding"] = (config.num_tasks + 1, width)
        shapes["mixture_router_task"] = (num, width)
        # task+x adds two products: the task's, whose tensors are these, and the token's own, whose rows come below.
        if gate.input == "task":
            return shapes
    # A noisy router says how far noise may move each logit too; an MLP's rows are its hidden layer.
    rows = {"noisy": 2 * num, "mlp": gate.width or 0}.get(gate.score, num)
    reads = {"x": place.d_in, "task+x": place.d_in, "z": config.rank, "hidden": place.hidden}
    shapes[f"mixture_router_{role}"] = (rows, reads.get(gate.input, config.external_width or 0))
    if gate.score in ("bias", "mlp"):
        shapes[f"mixture_bias_{role}"] = (rows,)
    if gate.score == "mlp":
        shapes[f"mixture_out_{role}"] = (num, rows)
    return shapes


__all__ = ["LinearSpec", "Place", "linear_spec"]
