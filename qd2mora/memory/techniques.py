"""What may be traded for memory, one row each; which of it cannot be combined; and a base prepared as planned.

A row says what the recipe leaves the planner to choose from, what a choice costs in time, and why it is taken or not.
What it saves is in the ledger.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from transformers import PreTrainedModel

from qd2mora.base.passes import CHUNK
from qd2mora.errors import InputRefused
from qd2mora.memory.checkpointing import decoder_layers, recompute_layers
from qd2mora.memory.embedding import keep_embedding_on_host
from qd2mora.memory.lean import make_lean
from qd2mora.memory.shapes import Shapes
from qd2mora.memory.streaming import LayerStream, move_unstreamed, streamed_layers
from qd2mora.mixture import MixtureConfig
from qd2mora.recipe import Recipe
from qd2mora.recipe.optimizers import OPTIMIZERS, OptimizerName, possible

# 131 MB of float32 logits at a vocabulary of 128,000, a quarter of the usual chunk's.
SMALL_CHUNK = 256


@dataclass(frozen=True)
class Layout:
    """How a run lies in memory: what the planner decides, and the dtype of products."""

    micro_batch: int
    recomputed: int
    """Decoder layers that are recomputed, the first ones."""
    dtype: torch.dtype
    on_gpu: bool
    loss_chunk: int = CHUNK
    optimizer: OptimizerName = "adamw"
    offload_activations: bool = False
    offload_embeddings: bool = False
    stream: bool = False
    resident: int = 0
    """Decoder layers that stay on the device while the others are streamed."""
    rows_by_layer: int = 0
    """Rows of the micro batches that take turns in each layer, all of which are recomputed; 0: one after the other."""
    masks: bool = True
    """Whether attention is given a mask, as it is where no kernel is quicker without; not the planner's to choose."""

    @property
    def at_once(self) -> int:
        """Micro batches that are under way together."""
        return max(1, self.rows_by_layer // self.micro_batch)


@dataclass(frozen=True)
class Case:
    """A run to be planned."""

    shapes: Shapes
    recipe: Recipe
    dtype: torch.dtype
    on_gpu: bool
    masks: bool = True

    @property
    def ties_head(self) -> bool:
        """Whether the output head is the embedding, which then has to be on the device."""
        return not self.shapes.head_entries

    @property
    def has_engine(self) -> bool:
        """Whether DeepSpeed puts the base where it goes."""
        return self.recipe.memory.engine != "none"


@dataclass(frozen=True)
class Technique:
    """One row of the table."""

    key: str
    """The recipe's."""
    attribute: str
    """The Layout's; its default saves nothing and costs nothing."""
    options: Callable[[Case, object], Sequence[object]]
    """The values to choose from, the fastest first, given what the recipe says."""
    share: Callable[[Layout, float], float]
    """Of a step, what it takes besides where it is used, given the share of layers that are recomputed."""
    why: Callable[[Layout], str]
    why_not: Callable[[Case], str]
    words: dict[object, str] = field(default_factory=dict)
    """What the recipe calls the values, where it has other names."""
    other: str | None = None
    """What it calls all that are not among those."""

    @property
    def plain(self) -> object:
        """The value that saves nothing."""
        found: object = getattr(Layout, self.attribute)
        return found

    def is_used(self, layout: Layout) -> bool:
        """Whether memory is saved by it."""
        return getattr(layout, self.attribute) != self.plain

    def asked(self, recipe: Recipe) -> object:
        """Return what a recipe says."""
        found: object = attrgetter(self.key)(recipe)
        return found

    def told(self, layout: Layout) -> object:
        """Return what a layout has, in the recipe's words."""
        value = getattr(layout, self.attribute)
        return self.words.get(value, self.other or value)

    def applied(self, layout: Layout, value: object) -> Layout:
        """Return a layout that has another value."""
        change: dict[str, Any] = {self.attribute: value}
        return replace(layout, **change)

    def cost(self, layout: Layout, recomputed: float) -> float:
        """Return the share of a step that it takes besides."""
        if self.is_used(layout):
            return self.share(layout, recomputed)
        return 0.0

    def reason(self, case: Case, layout: Layout) -> str:
        """Say why it is used, or why not."""
        if self.is_used(layout):
            return self.why(layout)
        return self.why_not(case)


def _chunks(case: Case, asked: object) -> Sequence[object]:
    if asked == "auto":
        return [CHUNK, SMALL_CHUNK]
    return [asked]


def _places(case: Case, asked: object, is_possible: bool) -> Sequence[object]:
    """Return whether something may leave the device; beside a CPU there is nowhere to go."""
    # What a recipe says is taken, even where it cannot be: `refuse_unfit` then says why, the planner does not overrule.
    if asked != "auto":
        return [asked != "none"]
    if case.on_gpu and is_possible:
        return [False, True]
    return [False]


def _why_here(case: Case) -> str:
    if case.on_gpu:
        return "fits without"
    return "beside a CPU there is nowhere to go"


def _why_embeddings_here(case: Case) -> str:
    if case.ties_head:
        return "tied to the output head"
    return _why_here(case)


def _why_weights_here(case: Case) -> str:
    if reads_weights_at_start(case.recipe):
        return "the adapter is made of them"
    return _why_here(case)


def why_not_by_layer(case: Case) -> str:
    """Say why micro batches cannot take turns in each layer; nothing where they can."""
    recipe, asked = case.recipe, case.recipe.memory.checkpointing
    objective = recipe.objective
    if case.has_engine:
        return f"memory.engine: {recipe.memory.engine} runs the passes of a micro batch in one piece"
    if asked == "off" or (isinstance(asked, int) and asked < case.shapes.num_layers):
        return f"every layer is recomputed by it, and memory.checkpointing is {asked}"
    if objective.reference == "live" or objective.kl or objective.head == "experts":
        return f"objective: {objective.kind} asks a second model in the midst of a micro batch"
    config = MixtureConfig.from_recipe(recipe.adapter, len(recipe.data.tasks))
    if any(gate.select == "sample" for gate in config.routers.values()):
        return "a router that samples runs a micro batch several times"
    if any(penalty.kind == "base_or_expert" and penalty.weight for penalty in config.routing_penalties):
        return "penalty base_or_expert runs a micro batch several times"
    if config.routers.first_pass != "nothing":
        return "a router reads a first pass over each micro batch"
    if config.row.backend != "ours":
        return f"dropout of method {config.method} is drawn in the order of layers"
    return ""


def _by_layer(case: Case, asked: object) -> Sequence[object]:
    """Return how many rows may take turns in each layer: a step's, or a part of them, and 0 where none have to."""
    if asked == "micro_batch" or (asked == "auto" and why_not_by_layer(case)):
        return [0]
    rows, found = case.recipe.train.global_batch, list[int]()
    while rows > 1:
        found.append(rows)
        rows //= 2
    return [*found, 0]


def _why_one_after_the_other(case: Case) -> str:
    asked = case.recipe.memory.offload.weights
    if asked == "none" or (asked == "auto" and not case.on_gpu):
        return "layers that are there need not be fetched"
    return why_not_by_layer(case) or "no copy would be waited for less"


def _why_streamed(layout: Layout) -> str:
    words = "frozen layers wait on the host and visit the device two at a time"
    if layout.resident:
        words += f"; {layout.resident} stay there, for which there is room"
    return words


# Shares of a step on a busy device: rough, and meant for their order, by which the planner takes them.
TECHNIQUES = (
    Technique(
        key="memory.loss_chunk",
        attribute="loss_chunk",
        options=_chunks,
        share=lambda layout, recomputed: 0.01,
        why=lambda layout: "logits of fewer tokens at once, 1% of time",
        why_not=lambda case: "logits of so many tokens at once fit, and more are no faster",
    ),
    Technique(
        key="train.optimizer",
        attribute="optimizer",
        options=lambda case, asked: possible(case.recipe.train.optimizer),
        share=lambda layout, recomputed: OPTIMIZERS[layout.optimizer].cost,
        why=lambda layout: OPTIMIZERS[layout.optimizer].choice,
        why_not=lambda case: OPTIMIZERS["adamw"].choice,
    ),
    Technique(
        key="memory.offload.activations",
        attribute="offload_activations",
        options=lambda case, asked: _places(case, asked, case.recipe.memory.checkpointing != "off"),
        share=lambda layout, recomputed: 0.02 * recomputed,
        why=lambda layout: "inputs of recomputed layers wait on the host, 2% of time",
        why_not=_why_here,
        words={True: "cpu", False: "none"},
    ),
    Technique(
        key="memory.offload.embeddings",
        attribute="offload_embeddings",
        options=lambda case, asked: _places(case, asked, not case.ties_head and not case.has_engine),
        share=lambda layout, recomputed: 0.003,
        why=lambda layout: "rows are looked up on the host, 0.3% of time",
        why_not=_why_embeddings_here,
        words={True: "cpu", False: "none"},
    ),
    Technique(
        key="memory.offload.weights",
        attribute="stream",
        options=lambda case, asked: _places(
            case, asked, not case.has_engine and not reads_weights_at_start(case.recipe)
        ),
        share=lambda layout, recomputed: 0.1,
        why=_why_streamed,
        why_not=_why_weights_here,
        words={True: "stream", False: "none"},
    ),
    Technique(
        key="memory.accumulation",
        attribute="rows_by_layer",
        options=_by_layer,
        share=lambda layout, recomputed: 0.0,
        why=lambda layout: f"{layout.at_once} micro batches take turns in each layer, which is fetched once for all",
        why_not=_why_one_after_the_other,
        words={0: "micro_batch"},
        other="layer",
    ),
)


def exact_changes(case: Case) -> list[dict[str, object]]:
    """Return changes that leave the learning as it is, or nearly: by their cost in speed, then in precision.

    Dotted key to value, as overrides.
    """
    changes: list[dict[str, object]] = [{"memory.loss_chunk": SMALL_CHUNK}]
    if case.on_gpu and not case.ties_head:
        changes.append({"memory.offload.embeddings": "cpu"})
    if case.on_gpu and case.recipe.memory.checkpointing != "off":
        changes.append({"memory.offload.activations": "cpu"})
    changes += [{"train.micro_batch": 1}, {"memory.checkpointing": "on"}, {"train.optimizer": "adamw_8bit"}]
    if case.on_gpu:
        changes.append({"memory.offload.weights": "auto"})
    return [*changes, {"base.double_quant": True}, {"base.quantization": "nf4"}]


def reads_weights_at_start(recipe: Recipe) -> bool:
    """Tell whether the adapter is made of the frozen weights before training, all of which must then be there."""
    shared = recipe.adapter.shared
    return recipe.adapter.method == "dora" or (shared is not None and shared.init in ("pissa", "olora", "loftq"))


def refuse_unfit(case: Case) -> None:
    """Refuse what cannot be combined. Raises InputRefused."""
    memory = case.recipe.memory
    offload = memory.offload
    if offload.activations == "cpu" and memory.checkpointing == "off":
        raise InputRefused(
            "memory.offload.activations: cpu will not do: inputs of recomputed layers are what leaves, and "
            "memory.checkpointing: off recomputes none"
        )
    if offload.embeddings == "cpu" and case.ties_head:
        raise InputRefused(
            "memory.offload.embeddings: cpu will not do: the output head of this base is tied to the embedding and "
            "needs it on the device; use none"
        )
    streams = offload.weights == "stream" and memory.zero_stage == 2  # ZeRO-3 does it in its own way
    if case.has_engine and (streams or offload.embeddings == "cpu"):
        raise InputRefused(
            f"memory.engine: {memory.engine} puts the whole base on the device; use "
            "memory.offload.weights=none memory.offload.embeddings=none, or memory.engine=none"
        )
    if offload.weights == "stream" and reads_weights_at_start(case.recipe):
        raise InputRefused(
            "memory.offload.weights: stream will not do: this adapter is made of the frozen weights before training, "
            "which must all be there; use none"
        )
    if memory.accumulation == "layer" and why_not_by_layer(case):
        raise InputRefused(f"memory.accumulation: layer will not do: {why_not_by_layer(case)}; use micro_batch")


def prepare_base(base: PreTrainedModel, layout: Layout, device: torch.device) -> LayerStream | None:
    """Apply a plan to a base before it is given adapters; return the stream where layers are streamed.

    A base to be streamed comes in host memory, any other on the device.
    """
    # Before anything hooks the layers: the classes of norms and MLPs are exchanged.
    make_lean(base)
    stream = None
    if layout.stream:
        layers = list(decoder_layers(base))
        stream = LayerStream([layers[index] for index in streamed_layers(len(layers), layout.resident)], device)
        staying = None
        if layout.offload_embeddings:
            staying = base.get_input_embeddings()
        move_unstreamed(base, device, but=staying)
    # The rows that a batch asks for cross over, not the table.
    if layout.offload_embeddings:
        keep_embedding_on_host(base, device)
    recompute_layers(base, layout.recomputed, layout.offload_activations, device)
    return stream


__all__ = [
    "TECHNIQUES",
    "Case",
    "Layout",
    "Technique",
    "exact_changes",
    "prepare_base",
    "refuse_unfit",
    "why_not_by_layer",
]
