"""What a method is: a row of data. How the banks are paired, what lies between them, what each gate reads and does.

Every method is y = W x + s B K_t A x and differs only in K_t. `presets` holds the rows, `routed.gate` says what a gate
is; `routed.routers` turns a gate's fields into numbers; `balance` and `penalties` hold what the penalties mean.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from qd2mora.errors import InputRefused
from qd2mora.recipe.adapter import DownInit
from qd2mora.recipe.section import MOST_EXPERTS
from qd2mora.routed.gate import Gate, Gates, Limits, numbers_of_gates, words_of_gates
from qd2mora.routed.ops import Core, Pairing

MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, *MLP)


@dataclass(frozen=True)
class Penalty:
    """A term of the loss. `kind` is a row of `balance` (reads routing) or of `penalties` (reads weights).

    A routing penalty is a mean over the attended tokens of a micro batch (`over="batch"`, as published) or over the
    rows of each row's value (`over="row"`: then the split into micro batches does not change it), and counts by the
    micro batch's share of the step's tokens. A weight penalty is a sum over modules, once an optimiser step.

    pool: whose decisions are one mean, as the authors' code has it: of each `router`, whose penalties then add up, of
    the routers of a `layer`, or of the whole `model`, where a weight does not grow with the number of routers.
    """

    kind: str
    weight: float
    over: Literal["batch", "row"] = "batch"
    order: float = 1.1
    delta: float = 0.0
    pool: Literal["router", "layer", "model"] = "router"


@dataclass(frozen=True)
class Method:
    """One member of the family; numbers are defaults that a recipe may override where the row does not forbid it.

    pairing: `chain`, any down expert with any up expert, two gates; `tied`, expert e is the pair A_e, B_e, one gate
        (`gate_down`). core: what lies between the banks. `gate_rank` weighs single ranks of one down expert.
    scaling_rank: what alpha is divided by, an expert's rank, that of all together, or the ranks that a token uses.
    one_expert: linears that get a single, ungated expert. allocation: experts by depth, "2-4-6-8" for four quarters.
    frozen: tensors that are not trained. `given`: experts come from adapters that are named, not from nothing.
    has_fixed_alpha: alpha is part of the formula, so that the scale changes with the rank; else the scale is the
        method's own, which an arm of a comparison keeps at any rank.
    has_public: the first expert is the base as it is, of rank 0.
    init_std: of Gaussian down experts; 1 / rank where None. magnitudes: linears that get a trained magnitude, without a
        LoRA where they are no target.
    mark: `verified` against the authors' code, `reconstruction` where a formula is inferred, `part` where only the
        part of another domain's method that carries over is offered, `ours` where nobody else's method it is; `note`
        says what was inferred or left out.
    """

    name: str
    title: str
    equation: str
    source: str
    mark: Literal["verified", "reconstruction", "part", "ours"] = "verified"
    note: str = ""
    pairing: Pairing = "chain"
    core: Core = "none"
    gate_down: Gate | None = None
    gate_up: Gate | None = None
    gate_core: Gate | None = None
    gate_rank: Gate | None = None
    rank: int = 16
    ranks: tuple[int, ...] | None = None
    has_public: bool = False
    alpha: float = 32.0
    has_fixed_alpha: bool = False
    down: int = 1
    up: int = 1
    cores: int = 0
    scales: tuple[int, ...] = ()
    penalties: tuple[Penalty, ...] = ()
    scaling_rank: Literal["expert", "total", "active"] = "expert"
    init_down: DownInit = "kaiming"
    init_std: float | None = 0.01
    router_std: float | None = None
    task_embedding: int | None = None
    placement: Literal["linear", "block", "mlp"] = "linear"
    one_expert: tuple[str, ...] = ()
    allocation: str | None = None
    frozen: tuple[str, ...] = ()
    given: Literal["no", "allowed", "needed"] = "allowed"
    magnitudes: tuple[str, ...] = ()
    base_scale: bool = False
    stages: bool = False
    backend: Literal["ours", "peft"] = "ours"
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gates: Gates = field(init=False, repr=False, hash=False, compare=False)

    def __post_init__(self) -> None:
        roles = {"down": self.gate_down, "up": self.gate_up, "core": self.gate_core, "rank": self.gate_rank}
        # Frozen, and derived: set once past the freeze, left out of hash and comparison.
        object.__setattr__(self, "gates", Gates({role: gate for role, gate in roles.items() if gate is not None}))

    def experts_of(self, down: int, up: int, rank: int, cores: int) -> dict[str, int]:
        """Return what a router of each role chooses among, in a linear of so many experts of this rank."""
        return {"down": down, "up": up, "core": cores, "rank": rank}

    @property
    def scaling(self) -> float:
        """What the method's own alpha and sizes make of it: what its authors' updates are multiplied with."""
        rank = max(self.ranks or (self.rank,))
        if self.scaling_rank == "total":
            rank *= self.down
        elif self.scaling_rank == "active":
            assert self.gate_rank is not None and self.gate_rank.top_k is not None
            rank = self.gate_rank.top_k
        return self.alpha / rank


def check_counts(method: Method, down: int, up: int) -> None:
    """Refuse expert counts that a method forbids. Raises InputRefused."""
    # Several experts under no gate would be a single one, their sum.
    for bank, count, gate in (("down", down, method.gate_down), ("up", up, method.gate_up)):
        if method.pairing == "chain" and gate is None and count != 1:
            raise InputRefused(f"adapter.{bank}.experts: {method.name} has one {bank} expert, {count} given")
    if method.pairing == "tied" and down != up:
        raise InputRefused(f"adapter: {method.name} pairs its experts; down.experts {down} and up.experts {up} differ")
    if method.scales and down != len(method.scales):
        scales = ", ".join(map(str, method.scales))
        raise InputRefused(f"adapter.down.experts: {method.name} has one for each scale ({scales}), {down} given")


def check_gate(gate: Gate, key: str, role: str, num_experts: int) -> None:
    """Refuse values that are not known and fields that do not go together. Raises InputRefused."""
    for name, known in words_of_gates().items():
        if getattr(gate, name) not in known:
            raise InputRefused(f"{key}.{name}: unknown '{getattr(gate, name)}'; there are {', '.join(known)}")
    for name, (_, limits) in numbers_of_gates().items():
        value = getattr(gate, name)
        if value is not None and not _fits(value, limits):
            raise InputRefused(f"{key}.{name}: {value} will not do: {_range(limits)}")
    for words in (*_choosing_problems(gate, num_experts), *_reading_problems(gate, role), *_scope_problems(gate)):
        raise InputRefused(f"{key}.{words}")


def _fits(value: object, limits: Limits) -> bool:
    # True is an int to Python, and YAML's yes is True.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    is_high_enough = value >= limits.get("ge", -math.inf) and value > limits.get("gt", -math.inf)
    return is_high_enough and value <= limits.get("le", math.inf)


def _range(limits: Limits) -> str:
    if "ge" in limits and "le" in limits:
        return f"a number from {limits['ge']} to {limits['le']}"
    if "ge" in limits:
        return f"a number, at least {limits['ge']}"
    if "le" in limits:
        return f"above {limits['gt']}, up to {limits['le']}"
    return f"above {limits['gt']}"


def _choosing_problems(gate: Gate, num_experts: int) -> Iterator[str]:
    """Yield what is wrong with how experts are chosen and weighed."""
    if gate.select in ("top_k", "sample", "entropy"):
        is_choice = num_experts > 1  # a single expert has no router to choose with
        if not isinstance(gate.top_k, int) or (is_choice and gate.top_k > num_experts):
            yield f"top_k: {gate.top_k} will not do: from 1 to the {num_experts} experts there are"
    elif gate.top_k is not None:
        yield f"top_k: {gate.top_k} will not do: select: {gate.select} takes none; it goes with top_k"
    if gate.score == "mlp" and gate.width is None:
        yield f"width: {gate.width} will not do: score: mlp needs the width of its hidden layer"
    if gate.draws > 1 and (gate.score != "mlp" or gate.draws > (gate.width or 0)):
        yield f"draws: {gate.draws} will not do: hidden units are drawn, of score: mlp, at most as many as its width"
    if gate.guidance and (gate.select != "sample" or gate.bias_rate):
        yield f"guidance: {gate.guidance} will not do: it goes with select: sample, and with bias_rate: 0"
    if gate.dropout and (gate.select == "fixed" or gate.score == "activation"):
        yield f"dropout: {gate.dropout} will not do: nothing stands in for a fixed expert, or a rank that chose itself"
    if gate.omega != 1.0 and gate.weight not in ("uniform", "straight_through"):
        yield f"omega: {gate.omega} will not do: weight: {gate.weight} has none; it goes with uniform, straight_through"
    if gate.weight == "bounded" and gate.select != "all":
        yield f"weight: bounded weighs every expert; select: {gate.select} does not"


def _reading_problems(gate: Gate, role: str) -> Iterator[str]:
    """Yield what a router cannot read, or cannot make of what it reads."""
    scores = {"none": ["static"], "self": ["activation"], "task": ["linear"], "span": ["linear"]}
    scores["task+x"] = ["linear", "bias", "mlp", "prototype"]
    possible = scores.get(gate.input, ["linear", "bias", "mlp", "noisy", "prototype"])
    if gate.input == "z" and role in ("down", "rank"):
        yield f"input: {gate.input} will not do for the {role} router: there is no mixed code before it"
    if gate.input == "self" and role != "rank":
        yield f"input: self will not do for the {role} router: only ranks choose themselves"
    if gate.score not in possible:
        yield f"score: {gate.score} will not do with input: {gate.input}; {' or '.join(possible)} will"
    if gate.select == "fixed" and gate.input not in ("task", "span"):
        yield f"select: fixed gives each task its own expert; it goes with input: task or span, not {gate.input}"
    if gate.input == "span" and (gate.select not in ("all", "fixed", "top_k") or gate.weight == "bounded"):
        yield f"select: {gate.select} with weight: {gate.weight} will not do with input: span; all, top_k or fixed will"
    if gate.granularity == "sequence" and gate.input not in ("x", "hidden", "external"):
        yield f"granularity: {gate.granularity} averages x or hidden, not {gate.input}"
    if gate.granularity == "task" and gate.input != "task":
        yield f"granularity: task goes with input: task, not {gate.input}"


def _scope_problems(gate: Gate) -> Iterator[str]:
    """Yield what a router that several linears share cannot do."""
    if gate.scope == "module":
        return
    if gate.input not in ("x", "task", "external", "hidden", "none"):
        yield f"scope: a router of the {gate.scope} cannot read {gate.input}"
    if gate.is_random:
        yield f"scope: chance cannot be shared by a {gate.scope}; noisy, sample and dropout stay in the module"


def experts_by_layer(allocation: str, num_layers: int) -> list[int]:
    """Return the experts of each layer: "2-4-6-8" gives a quarter of the layers each. Raises InputRefused."""
    if not re.fullmatch(r"\d{1,9}(-\d{1,9})*", allocation, re.ASCII):
        raise InputRefused(f"adapter.allocation: '{allocation}' will not do: experts by depth, for example 2-4-6-8")
    groups = [int(part) for part in allocation.split("-")]
    if not 1 <= min(groups) <= max(groups) <= MOST_EXPERTS:
        raise InputRefused(
            f"adapter.allocation: '{allocation}' will not do: 1 to {MOST_EXPERTS} experts in every layer"
        )
    if len(groups) > num_layers:
        raise InputRefused(f"adapter.allocation: '{allocation}' has {len(groups)} groups for {num_layers} layers")
    # As even as whole layers allow: 2-4-6-8 on 30 layers gives groups of 8, 7, 8 and 7.
    return [groups[layer * len(groups) // num_layers] for layer in range(num_layers)]


__all__ = ["ALL", "ATTENTION", "MLP", "Method", "Penalty", "check_counts", "check_gate", "experts_by_layer"]
