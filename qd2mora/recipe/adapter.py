"""The recipe's adapter section: what is trained."""

from typing import Annotated, Any, Literal

from pydantic import Field, create_model, model_validator

from qd2mora.recipe.section import (
    LARGEST,
    MOST,
    MOST_EXPERTS,
    SMALLEST,
    Fraction,
    NotNegative,
    Place,
    Positive,
    Section,
    Size,
)
from qd2mora.routed.gate import Limits, Role, numbers_of_gates, words_of_gates

SharedInit = Literal["kaiming", "orthogonal", "pissa", "olora", "eva", "loftq"]
"""How a shared expert starts: `pissa`, `olora`, `loftq` from the weight, `eva` from the data."""
DownInit = Literal["kaiming", "gaussian", "orthogonal", "sparse", "svd", "split"]
"""How down experts start; up experts start at zero. `svd`: each a slice of the weight's right singular
vectors; `split`: each the strongest of those of its own part of the weight."""


class Experts(Section):
    """One bank of experts."""

    experts: Annotated[int, Field(ge=1, le=MOST_EXPERTS)]
    """How many; each has its row in a router."""


class Shared(Section):
    """One expert more that no gate touches."""

    rank: Size
    """Inner width of this expert."""
    alpha: Positive | None = None
    """Scaled by alpha / rank; twice the rank where left out."""
    init: SharedInit = "kaiming"
    """`pissa`, `olora`: from the weight, its start subtracted again; `eva`: from the data's activations; `loftq`: what
    4-bit quantisation lost."""


_GATE = {
    "input": "What the router reads",
    "granularity": "What gets gates of its own",
    "scope": "What shares one router",
    "score": "How what is read becomes scores",
    "select": "Which experts are used",
    "weight": "What those count",
    "top_k": "Experts used, where the selection counts them",
    "top_p": "Share of the gates that the experts used have together, for `select: entropy`",
    "temperature": "Scores are divided by it; a lower one makes gates more decided",
    "entropy_order": "Order of the Tsallis entropy, for `select: entropy`",
    "entropy_limit": "Entropy above which all experts are used, for `select: entropy`",
    "omega": "What an expert that is used counts, for the weights `straight_through` and `uniform`",
    "width": "Inner width of a router that is a network, for `score: mlp` and `prototype`",
    "bias_rate": "How fast a bias moves that evens out the use of experts; 0: none",
    "guidance": "How much experts that are seldom used are drawn less, for `select: sample`; 0: not at all",
    "dropout": "The chance that an expert is left out for a token in training",
    "draws": "Draws of the router, whose scores count less where they do not agree, for `score: mlp`; 1: none",
}
"""What a gate's fields are for, as the reference of recipes tells it."""


class _Gate(Section):
    """What a gate's fields are added to."""

    @model_validator(mode="before")
    @classmethod
    def _pass_over_retired(cls, content: object) -> object:
        # Resolved recipes of old runs name every key; one that is no more changed nothing where it was left empty.
        if isinstance(content, dict) and content.get("capacity", 0) is None:
            return {key: value for key, value in content.items() if key != "capacity"}
        return content


def _gate_fields() -> type[Section]:
    """Return the section made of a gate's fields: words as they come, numbers with their ranges."""
    # `mixture.method` names the words there are once it knows which the method forbids.
    found: dict[str, Any] = {}
    for word, words in words_of_gates().items():
        found[word] = (str | None, Field(None, description=f"{_GATE[word]}: {', '.join(words)}."))
    for number, (kind, limits) in numbers_of_gates().items():
        found[number] = (
            Annotated[kind, Field(**_in_reach(kind, limits))] | None,
            Field(None, description=f"{_GATE[number]}."),
        )
    about = "Fields of one router; those left out are the method's (`qd2mora methods NAME`)."
    return create_model("GateFields", __base__=_Gate, __doc__=about, __module__=__name__, **found)


def _in_reach(kind: type, limits: Limits) -> Limits:
    """Return a number's range within what float32 and counts can hold."""
    most: Limits = {"le": MOST if kind is int else LARGEST}
    least: Limits = {"ge": SMALLEST} if "gt" in limits else {}
    return {**most, **least, **limits}


GateFields = _gate_fields()


class Adapter(Section):
    """What is trained. Keys left out take the method's own defaults (`qd2mora methods`)."""

    method: str = "d2mora"
    """Which of the mixtures; `qd2mora methods` lists them."""
    rank: Size | None = None
    """Inner width of one expert."""
    ranks: Annotated[list[Annotated[int, Field(ge=0, le=2**20)]], Field(min_length=1)] | None = None
    """A rank for each paired expert, where they differ; 0 first where the base is one (`flexmore`)."""
    attention_rank: Size | None = None
    """Inner width where a method has one expert alone: attention's of `mixlora`; else `rank`. Its update is scaled by
    alpha over it."""
    alpha: Positive | None = None
    """The update is scaled by alpha / rank."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA)."""
    dropout: Fraction = 0.0
    """Dropout on what the down experts read, never on what the routers read."""
    dropout_per_expert: bool = False
    """An independent mask per down expert, as in the authors' code, instead of one per linear."""
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] | None = None
    """Names of the linears that get an adapter; the method's own where left out."""
    down: Experts | None = None
    up: Experts | None = None
    core: Experts | None = None
    """The routed cores between down and up, where a method has them."""
    allocation: str | None = None
    """Experts by depth: "2-4-6-8" gives each quarter of the layers so many (MoLA's schedule, for every method)."""
    gates: dict[Role, GateFields] | None = None  # type: ignore[valid-type]  # mypy follows no made class
    """Changes of the method's routers; paired experts have the one called down."""
    penalty: NotNegative | None = None
    """Weight of the method's first penalty; D2MoRA's is the orthogonality of experts."""
    penalties: dict[str, NotNegative] | None = None
    """Weights of penalties by kind, the method's own or others."""
    shared: Shared | None = None
    """One expert more that no gate touches."""
    experts: Literal["dora"] | None = None
    """Experts of `mixlora`, attention's too, that are DoRAs: each has a trained magnitude of its weight's rows."""
    init: DownInit | None = None
    """How down experts start; up experts start at zero. `svd`: at slices of the weight's right singular vectors, the
    first expert at the strongest, so that experts differ from the start; `split`: each at the strongest of its own part
    of the pretrained weight, cut by the neurons inside a block as if its MLP had been split into experts."""
    start: Place | None = None
    """Folder of an adapter to go on from: a run, an adapter, a PEFT LoRA, or what `compose` made. It says the method
    and all sizes; keys given beside it must agree, but for dropout and penalties, which are this run's own."""
    grow: Size | None = None
    """With `start`: as many new experts in each bank; all that was there is frozen, and at the end the same bits."""
    adapters: Annotated[list[Place], Field(min_length=2)] | None = None
    """Folders of trained LoRAs that become the paired experts, where a method takes them."""
    train_experts: bool = True
    """Whether such experts go on training, or the routers alone do."""
    external_width: Size | None = None
    """Length of the vector that each row brings, where a router reads one."""
    task_embedding: Size | None = None
    """Width of the task embedding where a method routes by task."""


__all__ = ["Adapter", "DownInit", "Experts", "GateFields", "Shared", "SharedInit"]
