"""What a method is: a row of data. How the banks are paired, what lies between them, what each gate reads and does.

Every method is y = W x + s B K_t A x and differs only in K_t. `presets` holds the rows; `routers` turns a gate's fields
into numbers; `balance` and `penalties` hold what the penalties mean.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from qd2mora.errors import InputRefused

STATIC, TASK, TOKEN = "static", "task", "token"

Input = Literal["x", "z", "self", "task", "task+x", "external", "hidden", "none"]
Granularity = Literal["token", "sequence", "prefix", "task"]
Scope = Literal["module", "block", "model"]
Score = Literal["linear", "bias", "mlp", "noisy", "prototype", "static", "activation"]
Select = Literal["all", "top_k", "top_p", "entropy", "switch", "fixed", "sample"]
Weight = Literal["softmax", "renorm", "sigmoid", "uniform", "one", "straight_through", "bounded"]

_WORDS: dict[str, Any] = {
    "input": Input,
    "granularity": Granularity,
    "scope": Scope,
    "score": Score,
    "select": Select,
    "weight": Weight,
}

MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, *MLP)

# Numbers of a gate, and the least that will do.
_LEAST = {"top_k": 1, "top_p": 0, "temperature": 0, "entropy_order": 0, "entropy_limit": 0, "capacity": 1, "omega": 0}
_LEAST |= {"width": 1, "bias_rate": 0}

# Weights that sum to one over the experts: over a single expert such a gate is the constant 1 and has no router.
_SUM_TO_ONE = ("softmax", "renorm", "straight_through", "one")


@dataclass(frozen=True)
class Gate:
    """A router by six fields, and the numbers they take.

    input: `x` the linear's input, undropped; `z` the mixed code in rank space; `self` the rank units' own activations;
        `task` an embedding of the row's task; `task+x` both; `external` a vector of the row; `hidden` the last hidden
        states of a first pass without adapters; `none`.
    granularity: `token`; `sequence`, the mean over the prompt's tokens, kept while decoding; `prefix`, the running mean
        over the tokens so far; `task`. A mean over the batch does not exist: it would let rows see each other.
    scope: one router for each `module`, or one for each `block` (attention or MLP) or for the `model`, read where its
        first adapted linear stands.
    score, select, weight: see `routers`. Weight `one` gives the router no gradient of its own; `straight_through` is
        omega on what is chosen, with the gradient of the softmax.
    """

    input: Input = "x"
    granularity: Granularity = "token"
    scope: Scope = "module"
    score: Score = "linear"
    select: Select = "all"
    weight: Weight = "softmax"
    top_k: int | None = None
    top_p: float = 0.75
    temperature: float = 1.0
    entropy_order: float = 1.1
    entropy_limit: float = 0.9
    capacity: int | None = None
    omega: float = 1.0
    width: int | None = None
    bias_rate: float = 0.0

    @property
    def depends_on(self) -> str:
        """What this gate's weights depend on."""
        if self.input == "none":
            return STATIC
        return TASK if self.input in ("task", "external") else TOKEN

    @property
    def is_averaged(self) -> bool:
        """Whether its scores are averaged over tokens; a vector of the row is the same at each."""
        return self.granularity in ("sequence", "prefix") and self.input != "external"

    @property
    def reads_x(self) -> bool:
        """Whether its router's rows stand in the one product over x."""
        return self.input in ("x", "task+x") and self.scope == "module" and self.granularity == "token"

    def is_constant(self, num_experts: int) -> bool:
        """Whether the weights are 1 whatever is read."""
        return num_experts == 1 and self.weight in _SUM_TO_ONE


@dataclass(frozen=True)
class Penalty:
    """A term of the loss. `kind` is a row of `balance` (reads routing) or of `penalties` (reads weights).

    A routing penalty is a mean over the attended tokens of a micro batch (`over="batch"`, as published) or over the
    rows of each row's value (`over="row"`: then the split into micro batches does not change it), and counts by the
    micro batch's share of the step's tokens. A weight penalty is a sum over modules, once an optimiser step.
    """

    kind: str
    weight: float
    over: Literal["batch", "row"] = "batch"
    order: float = 1.1
    delta: float = 0.0


@dataclass(frozen=True)
class Method:
    """One member of the family; numbers are defaults that a recipe may override where the row does not forbid it.

    pairing: `chain`, any down expert with any up expert, two gates; `tied`, expert e is the pair A_e, B_e, one gate
        (`gate_down`). core: what lies between the banks. `gate_rank` weighs single ranks of one down expert.
    one_expert: linears that get a single, ungated expert. allocation: experts by depth, "2-4-6-8" for four quarters.
    frozen: tensors that are not trained. `given`: experts come from adapters that are named, not from nothing.
    init_std: of Gaussian down experts; 1 / rank where None.
    mark: `verified` against the authors' code, `reconstruction` where a formula is inferred, `part` where only the
        part of another domain's method that carries over is offered; `note` says what was inferred or left out.
    """

    name: str
    title: str
    equation: str
    source: str
    mark: Literal["verified", "reconstruction", "part"] = "verified"
    note: str = ""
    pairing: Literal["chain", "tied"] = "chain"
    core: Literal["none", "dense", "bank", "diagonal", "kron"] = "none"
    gate_down: Gate | None = None
    gate_up: Gate | None = None
    gate_core: Gate | None = None
    gate_rank: Gate | None = None
    rank: int = 16
    ranks: tuple[int, ...] | None = None
    alpha: float = 32.0
    down: int = 1
    up: int = 1
    cores: int = 0
    scales: tuple[int, ...] = ()
    penalties: tuple[Penalty, ...] = ()
    scaling_rank: Literal["expert", "total"] = "expert"
    init_down: Literal["kaiming", "gaussian", "orthogonal", "sparse"] = "kaiming"
    init_std: float | None = 0.01
    router_std: float | None = None
    task_embedding: int | None = None
    placement: Literal["linear", "block", "mlp"] = "linear"
    one_expert: tuple[str, ...] = ()
    allocation: str | None = None
    frozen: tuple[str, ...] = ()
    given: Literal["no", "allowed", "needed"] = "allowed"
    base_scale: bool = False
    stages: bool = False
    estimator: Literal["none", "rloo"] = "none"
    backend: Literal["ours", "peft"] = "ours"
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gates: dict[str, Gate] = field(init=False, repr=False, hash=False, compare=False)

    def __post_init__(self) -> None:
        roles = {"down": self.gate_down, "up": self.gate_up, "core": self.gate_core, "rank": self.gate_rank}
        object.__setattr__(self, "gates", {role: gate for role, gate in roles.items() if gate is not None})

    @property
    def depends_on(self) -> str:
        """What K depends on: `static` merges exactly, `task` exactly for one task or vector, `token` approximately."""
        return most_dependent(self.gates.values())

    @property
    def reads_task(self) -> bool:
        """Whether a gate needs the row's task, alone or beside x."""
        return any(gate.input in ("task", "task+x") for gate in self.gates.values())

    @property
    def reads_vector(self) -> bool:
        """Whether a gate needs a vector of the row."""
        return any(gate.input == "external" for gate in self.gates.values())

    def penalty_weight(self, kind: str) -> float:
        """Return the weight of one kind of penalty; 0 where the method has none."""
        return sum(penalty.weight for penalty in self.penalties if penalty.kind == kind)


def most_dependent(gates: Iterable[Gate]) -> str:
    """Return what K depends on where these gates make it."""
    found = {gate.depends_on for gate in gates}
    return TOKEN if TOKEN in found else TASK if TASK in found else STATIC


def check_counts(method: Method, down: int, up: int) -> None:
    """Refuse expert counts that a method forbids. Raises InputRefused."""
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
    for name, known in _WORDS.items():
        if getattr(gate, name) not in get_args(known):
            raise InputRefused(f"{key}.{name}: unknown '{getattr(gate, name)}'; there are {', '.join(get_args(known))}")
    for name, least in _LEAST.items():
        value = getattr(gate, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= least):
            raise InputRefused(f"{key}.{name}: {value} will not do: a number, at least {least}")
    takes_top_k = gate.select in ("top_k", "sample", "entropy")
    most = num_experts if num_experts > 1 else math.inf  # a single expert has no router to choose with
    problems = {
        f"top_k: {gate.top_k} will not do: from 1 to the {num_experts} experts there are": (
            takes_top_k and not (isinstance(gate.top_k, int) and gate.top_k <= most)
        ),
        f"top_k: {gate.top_k} will not do: select: {gate.select} takes none; it goes with top_k": (
            not takes_top_k and gate.top_k is not None
        ),
        f"top_p: {gate.top_p} will not do: above 0, up to 1": not 0 < gate.top_p <= 1,
        f"temperature: {gate.temperature} will not do: above 0": not gate.temperature > 0,
        f"capacity: {gate.capacity} will not do: it goes with select: switch": (
            gate.capacity is not None and gate.select != "switch"
        ),
        f"width: {gate.width} will not do: score: mlp needs the width of its hidden layer": (
            gate.score == "mlp" and gate.width is None
        ),
        f"weight: bounded weighs every expert; select: {gate.select} does not": (
            gate.weight == "bounded" and gate.select != "all"
        ),
        **_reading_problems(gate, role),
        **_scope_problems(gate),
    }
    for words, is_wrong in problems.items():
        if is_wrong:
            raise InputRefused(f"{key}.{words}")


def _reading_problems(gate: Gate, role: str) -> dict[str, bool]:
    """What a router cannot read, or cannot make of what it reads."""
    scores = {"none": ["static"], "self": ["activation"], "task": ["linear"]}
    scores["task+x"] = ["linear", "bias", "mlp", "prototype"]
    possible = scores.get(gate.input, ["linear", "bias", "mlp", "noisy", "prototype"])
    return {
        f"input: {gate.input} will not do for the {role} router: there is no mixed code before it": (
            gate.input == "z" and role in ("down", "rank")
        ),
        f"input: self will not do for the {role} router: only ranks choose themselves": (
            gate.input == "self" and role != "rank"
        ),
        f"score: {gate.score} will not do with input: {gate.input}; {' or '.join(possible)} will": (
            gate.score not in possible
        ),
        f"select: fixed gives each task its own expert; it goes with input: task, not {gate.input}": (
            gate.select == "fixed" and gate.input != "task"
        ),
        f"granularity: {gate.granularity} averages x or hidden, not {gate.input}": (
            gate.granularity in ("sequence", "prefix") and gate.input not in ("x", "hidden", "external")
        ),
        f"granularity: task goes with input: task, not {gate.input}": (
            gate.granularity == "task" and gate.input != "task"
        ),
    }


def _scope_problems(gate: Gate) -> dict[str, bool]:
    """What a router that several linears share cannot do."""
    return {
        f"scope: a router of the {gate.scope} cannot read {gate.input}": (
            gate.scope != "module" and gate.input not in ("x", "task", "external", "hidden", "none")
        ),
        f"scope: chance cannot be shared by a {gate.scope}; noisy and sample stay in the module": (
            gate.scope != "module" and (gate.score == "noisy" or gate.select == "sample")
        ),
    }


__all__ = [
    "ALL",
    "ATTENTION",
    "MLP",
    "STATIC",
    "TASK",
    "TOKEN",
    "Gate",
    "Method",
    "Penalty",
    "check_counts",
    "check_gate",
    "most_dependent",
]
