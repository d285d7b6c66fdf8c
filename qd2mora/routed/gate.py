"""What a router is: a row of data, by six words and the numbers they take.

The one place where a gate's fields, words and ranges stand: a recipe's keys (`recipe.adapter`) and what is refused
(`mixture.method`) follow from `Gate`; `routers` and `ops` turn it into numbers.
"""

from dataclasses import dataclass, field, fields
from typing import Literal, TypedDict, cast, get_args, get_type_hints

STATIC, TASK, TOKEN = "static", "task", "token"

Role = Literal["down", "up", "core", "rank"]
Input = Literal["x", "z", "self", "task", "task+x", "span", "external", "hidden", "none"]
Granularity = Literal["token", "sequence", "task"]
Scope = Literal["module", "block"]
Score = Literal["linear", "bias", "mlp", "noisy", "prototype", "static", "activation"]
Select = Literal["all", "top_k", "entropy", "fixed", "sample"]
_Learned = Literal["softmax", "renorm", "dense", "soft", "sigmoid", "sigmoid_renorm", "straight_through", "bounded"]
Weight = Literal[_Learned, "uniform", "equal", "one"]

FirstPass = Literal["nothing", "prompt", "tokens"]

ROLES: tuple[Role, ...] = get_args(Role)

# Weights that sum to one over the experts: over a single expert such a gate is the constant 1 and has no router.
_SUM_TO_ONE = ("softmax", "renorm", "dense", "soft", "equal", "straight_through", "one")


@dataclass(frozen=True)
class Gate:
    """A router by six fields, and the numbers they take; `metadata` is a number's range, in pydantic's words.

    input: `x` the linear's input, undropped; `z` the mixed code in rank space; `self` the rank units' own activations;
        `task` an embedding of the row's task; `task+x` both; `span` the mark of the span a token lies in, with gates of
        0 in none; `external` a vector of the row; `hidden` the last hidden
        states of a first pass without adapters; `none`.
    granularity: `token`; `sequence`, the mean over the prompt's tokens, kept while decoding; `task`. A mean over the
        batch does not exist: it would let rows see each other.
    scope: one router for each `module`, or one for each `block` (attention or MLP), read where its first adapted linear
        stands.
    score, select, weight: see `routers`. Weights `one` and `equal` (an equal part of one) give the router none of the
        loss's gradient; `straight_through` is omega on what is chosen, with the gradient of the softmax; `dense` is
        the softmax over all experts, whatever is chosen for penalties and counts; `soft` is that in training and
        `renorm` after it; `sigmoid_renorm` is k times an expert's part of the k chosen sigmoids.
    dropout: the chance that an expert is left out for a token, in training; gates that sum to one still do.
    guidance: of `sample`, how much experts that are seldom used are drawn less: a multiple of the log of their share of
        use, added to the scores that experts are drawn by.
    draws: of a network as router, each without its part of the hidden units: scores they do not agree on count less.
    """

    input: Input = "x"
    granularity: Granularity = "token"
    scope: Scope = "module"
    score: Score = "linear"
    select: Select = "all"
    weight: Weight = "softmax"
    top_k: int | None = field(default=None, metadata={"ge": 1})
    top_p: float = field(default=0.75, metadata={"gt": 0, "le": 1})
    temperature: float = field(default=1.0, metadata={"gt": 0})
    entropy_order: float = field(default=1.1, metadata={"gt": 0})
    entropy_limit: float = field(default=0.9, metadata={"ge": 0})
    omega: float = field(default=1.0, metadata={"gt": 0})
    width: int | None = field(default=None, metadata={"ge": 1})
    bias_rate: float = field(default=0.0, metadata={"ge": 0})
    guidance: float = field(default=0.0, metadata={"ge": 0})
    dropout: float = field(default=0.0, metadata={"ge": 0, "le": 0.9})
    draws: int = field(default=1, metadata={"ge": 1, "le": 1024})

    @property
    def depends_on(self) -> str:
        """What this gate's weights depend on."""
        # A vector of the row is as good as a task: it stays the same over the row's tokens, so one export serves it.
        if self.input == "none":
            return STATIC
        return TASK if self.input in ("task", "external") else TOKEN

    @property
    def is_averaged(self) -> bool:
        """Whether its scores are averaged over tokens; a vector of the row is the same at each."""
        return self.granularity == "sequence" and self.input != "external"

    @property
    def reads_x(self) -> bool:
        """Whether its router's rows stand in the one product over x."""
        # A mean over the prompt and a router of several linears are computed apart, once, and given to the step.
        return self.input in ("x", "task+x") and self.scope == "module" and self.granularity == "token"

    @property
    def has_moved_bias(self) -> bool:
        """Whether a bias steers its selection that moves with the use of experts."""
        return self.bias_rate > 0 or self.guidance > 0

    @property
    def is_random(self) -> bool:
        """Whether it draws random numbers in training."""
        return self.score == "noisy" or self.select == "sample" or self.dropout > 0

    def is_constant(self, num_experts: int) -> bool:
        """Whether the weights are 1 whatever is read."""
        # Outside of spans even a single expert counts 0.
        return num_experts == 1 and self.weight in _SUM_TO_ONE and self.input != "span"


class Gates(dict[str, Gate]):
    """The routers of an adapter by role; none at all is an update that depends on nothing."""

    @property
    def depends_on(self) -> str:
        """What K depends on: `static` merges exactly, `task` exactly for one task or vector, `token` approximately."""
        found = {gate.depends_on for gate in self.values()}
        # The least static gate decides: one gate that reads tokens makes K differ from token to token.
        for most in (TOKEN, TASK):
            if most in found:
                return most
        return STATIC

    @property
    def reads_task(self) -> bool:
        """Whether one needs the row's task, alone or beside x."""
        return any(gate.input in ("task", "task+x") for gate in self.values())

    @property
    def reads_spans(self) -> bool:
        """Whether one needs the marks of the spans that tokens lie in."""
        return any(gate.input == "span" for gate in self.values())

    @property
    def reads_vector(self) -> bool:
        """Whether one needs a vector of the row."""
        return any(gate.input == "external" for gate in self.values())

    @property
    def first_pass(self) -> FirstPass:
        """Of what the last hidden states of a pass without adapters are needed, before the pass itself."""
        readers = [gate for gate in self.values() if gate.input == "hidden"]
        if not readers:
            return "nothing"
        # A mean over the prompt is kept while the answer is written, beside a cache; of new tokens there is no cache.
        return "prompt" if all(gate.is_averaged for gate in readers) else "tokens"


def words_of_gates() -> dict[str, tuple[str, ...]]:
    """Return the fields that take a word, each with the words there are."""
    kinds = get_type_hints(Gate)
    return {each.name: get_args(kinds[each.name]) for each in fields(Gate) if not each.metadata}


class Limits(TypedDict, total=False):
    """A number's range: at least `ge` or above `gt`, at most `le`."""

    ge: float
    gt: float
    le: float


def numbers_of_gates() -> dict[str, tuple[type[int] | type[float], Limits]]:
    """Return the fields that take a number, each with its type and its range."""
    found: dict[str, tuple[type[int] | type[float], Limits]] = {}
    kinds = get_type_hints(Gate)
    for each in fields(Gate):
        if each.metadata:
            kind = kinds[each.name]
            if kind is not float:  # int | None
                kind = int
            found[each.name] = (kind, cast(Limits, dict(each.metadata)))
    return found


__all__ = [
    "ROLES",
    "STATIC",
    "TASK",
    "TOKEN",
    "Gate",
    "Gates",
    "Limits",
    "Role",
    "numbers_of_gates",
    "words_of_gates",
]
