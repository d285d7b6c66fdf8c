"""The ledger: what a run keeps in memory, item by item in bytes, from shapes alone.

A step has phases that can be its peak: the loss, the backward pass through the last layer that was kept, that through
a recomputed one, and the gradient of the orthogonality penalty; a run evaluates and saves besides, and may write its
answers itself. What is alive at the
greatest of them is the plan; the others' items are told apart. Host memory is counted by itself on a GPU; on a CPU it
is the same memory.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from qd2mora.memory.activations import (
    FLOAT,
    IN_FLIGHT,
    LayerShapes,
    Pass,
    backward_bytes,
    evaluation_bytes,
    kept_bytes,
    layer_inputs_bytes,
    loss_bytes,
    recomputed_bytes,
)
from qd2mora.memory.shapes import Shapes
from qd2mora.memory.sizes import block_maxima, dequantised_bytes, nf4_bytes, penalty_bytes, trainable_bytes
from qd2mora.memory.streaming import SLOTS, aligned, streamed_layers
from qd2mora.memory.techniques import Layout
from qd2mora.memory.writing import writing_bytes
from qd2mora.recipe import Recipe

CUDA_CONTEXT = 512 << 20
"""Driver, kernels and cuBLAS workspace: 0.3 to 0.6 GiB by card and driver."""

CHECKPOINT_COPY = "copy of a checkpoint"
STREAMED, EMBEDDINGS, INPUTS = "streamed layers (host)", "embeddings (host)", "layer inputs (host)"
"""What lives in host memory beside a GPU."""

Phase = Literal["loss", "backward", "recomputing", "penalty", "evaluation", "writing"]


@dataclass(frozen=True)
class Ledger:
    """Bytes by item: those alive at the peak, those of other phases, and those of host memory beside a GPU."""

    items: dict[str, int]
    elsewhere: dict[str, int]
    host: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """The sum of what is alive at the peak."""
        return sum(self.items.values())


def ledger(shapes: Shapes, recipe: Recipe, layout: Layout, texts: int = 1) -> Ledger:
    """Return the bytes of every item of a run on rows of `data.max_length` tokens, all of them labelled.

    `texts`: how many answers are written at once, where the run writes them itself.
    """
    done = Pass(
        rows=layout.micro_batch * recipe.objective.needs.lines,
        length=recipe.data.max_length,
        item=layout.dtype.itemsize,
        dropout=recipe.adapter.dropout > 0,
        masks=layout.masks,
    )
    static = weight_bytes(shapes, recipe, done.item)
    host = _leave_for_host(static, shapes, recipe, layout)
    trained = trainable_bytes(shapes.trainable, layout.optimizer)
    static |= trained
    static["adapters"] += FLOAT * shapes.still
    if layout.on_gpu:
        static["CUDA context"] = CUDA_CONTEXT
    if layout.offload_activations:
        host[INPUTS] = layout.at_once * layout.recomputed * done.tokens * done.item * shapes.layer.hidden
    phases = _phases(shapes, recipe, layout, done)
    if recipe.objective.kind == "grpo":
        phases["writing"] = writing_bytes(shapes, recipe, replace(done, rows=texts))
    # Made where there is room beside the run; where there is none, training waits for the disk instead.
    host[CHECKPOINT_COPY] = trained["adapters"] + trained["optimizer state"]
    # Phases follow each other and never overlap: the greatest is the peak, and their sum would refuse runs that fit.
    peak = max(phases.values(), key=lambda phase: sum(phase.values()))
    others = {name: size for phase in phases.values() for name, size in phase.items() if name not in peak}
    # One memory: what was moved to the host is no saving there.
    if not layout.on_gpu:
        others[CHECKPOINT_COPY] = host.pop(CHECKPOINT_COPY)
        static |= host
        host = {}
    return Ledger(static | peak, others, host)


def _phases(shapes: Shapes, recipe: Recipe, layout: Layout, done: Pass) -> dict[Phase, dict[str, int]]:
    """Return what is alive in each phase besides weights, adapters, gradients and moments."""
    layer, chunk, vocab = shapes.layer, layout.loss_chunk, shapes.vocab
    if not recipe.objective.needs.has_logits:
        chunk = vocab = 0
    num_kept, kept, gradients, dequantised = shapes.num_layers - layout.recomputed, {}, {}, 0
    inputs = _inputs(layer, done, layout)
    if num_kept:
        kept = {"activations": kept_bytes(layer, done, num_kept, is_whole=not inputs)}
    if recipe.base.quantization == "nf4":
        dequantised = dequantised_bytes(shapes.largest_linear, recipe.base.double_quant, done.item)
    if shapes.normed:
        # PEFT's DoRA holds the weight, the update, the update scaled and their sum at once.
        gradients = {"row norms of weights": 4 * shapes.normed * done.item}
    gradients |= backward_bytes(layer, done, dequantised)
    evaluation = {"evaluation": evaluation_bytes(layer, vocab, done, chunk, dequantised)}
    if shapes.still:  # every pass is one of evaluation, and what is trained stands above the last states
        return {"evaluation": evaluation}
    phases: dict[Phase, dict[str, int]] = {
        "loss": inputs | kept | {"logits and loss": loss_bytes(layer, vocab, done, chunk)},
        # Activations are gone by then: the penalty's gradient is added after the last micro batch.
        "penalty": {"orthogonality penalty": penalty_bytes(shapes.penalised, shapes.penalty_weight)},
        "evaluation": evaluation,
    }
    if kept:
        phases["backward"] = inputs | kept | gradients
    if inputs:
        phases["recomputing"] = inputs | {"one layer recomputed": recomputed_bytes(layer, done)} | gradients
    return phases


def _inputs(layer: LayerShapes, done: Pass, layout: Layout) -> dict[str, int]:
    """Return what stays on the device of layers that are recomputed."""
    number = layout.recomputed
    if layout.offload_activations:
        number = min(IN_FLIGHT, number)
    if not number:
        return {}
    inputs = {"layer inputs": layer_inputs_bytes(layer, done, number)}
    if layout.at_once > 1:
        # Of each that takes turns its inputs, or where these leave, its mask and tables; and its states, or their
        # gradient, which wait for the others'.
        staying = 0 if layout.offload_activations else number
        inputs["layer inputs"] += (layout.at_once - 1) * layer_inputs_bytes(layer, done, staying)
        # One more: the decoder runs again for each loss, and what it makes before its layers stands beside.
        inputs["states that wait their turn"] = (layout.at_once + 1) * done.tokens * done.item * layer.hidden
    return inputs


def _leave_for_host(static: dict[str, int], shapes: Shapes, recipe: Recipe, layout: Layout) -> dict[str, int]:
    """Take from the device's items what lives on the host, add what stands in for it, and return the host's."""
    host = {}
    # The output head stays: it is asked for every token, the embedding for single rows.
    if layout.offload_embeddings:
        host[EMBEDDINGS] = static.pop("embeddings")
    if layout.stream:
        is_nf4 = recipe.base.quantization == "nf4"
        weights, state, largest, all_buffers = _streamed_bytes(
            shapes, is_nf4, recipe.base.double_quant, layout.dtype.itemsize, layout.resident
        )
        if is_nf4:
            static["4-bit weights"] -= weights
            static["quantisation state"] -= state
        else:
            static["linear weights"] -= weights
        # All slots are as large as the largest layer: any layer visits any slot that its number falls on.
        static["slots of streamed layers"] = SLOTS * largest
        host[STREAMED] = all_buffers
    return host


def weight_bytes(shapes: Shapes, recipe: Recipe, item: int) -> dict[str, int]:
    """Return the frozen model's bytes by kind; `item` bytes an entry for what is not 4-bit."""
    # A copy, because what lives on the host is taken out of it (`_leave_for_host`).
    return dict(_weight_bytes(shapes, recipe.base.quantization == "nf4", recipe.base.double_quant, item))


@lru_cache(maxsize=64)
def _weight_bytes(shapes: Shapes, is_nf4: bool, double_quant: bool, item: int) -> dict[str, int]:
    items = {}
    if is_nf4:
        sizes = [nf4_bytes(linear.entries, double_quant) for linear in shapes.linears]
        items["4-bit weights"] = sum(packed for packed, _ in sizes)
        items["quantisation state"] = sum(state for _, state in sizes)
    else:
        items["linear weights"] = item * sum(linear.entries for linear in shapes.linears)
    items["embeddings"] = item * shapes.embedding_entries
    items["output head"] = item * shapes.head_entries
    items["norms and biases"] = item * shapes.other_entries
    return items


def fetched_bytes(shapes: Shapes, recipe: Recipe, layout: Layout) -> int:
    """Return what of the weights crosses to the device in a step, once steps follow each other.

    Every streamed layer once forward and once backward, for each micro batch or all that take turns; but those in the
    slots where the pass turns are not fetched again.
    """
    if not layout.stream:
        return 0
    is_nf4, number = recipe.base.quantization == "nf4", len(streamed_layers(shapes.num_layers, layout.resident))
    *_, once = _streamed_bytes(shapes, is_nf4, recipe.base.double_quant, layout.dtype.itemsize, layout.resident)
    rows = layout.at_once * layout.micro_batch
    passes = -(-recipe.train.global_batch // rows)
    return 2 * passes * once * max(0, number - SLOTS) // number


@lru_cache(maxsize=64)
def _streamed_bytes(
    shapes: Shapes, is_nf4: bool, double_quant: bool, item: int, resident: int
) -> tuple[int, int, int, int]:
    """Return what is streamed: bytes of weights, of block maxima, of the largest buffer and of all buffers."""
    # As `streaming` lays its buffers out: one a layer, each tensor at a multiple of the alignment.
    weights = state = 0
    buffers = []
    layers = shapes.of_layers()
    for index in streamed_layers(len(layers), resident):
        linears, buffer = layers[index], 0
        for linear in linears:
            packed, maxima = item * linear.entries, list[int]()
            if is_nf4:
                packed, maxima = nf4_bytes(linear.entries, double_quant)[0], block_maxima(linear.entries, double_quant)
            weights, state = weights + packed, state + sum(maxima)
            buffer += aligned(packed) + sum(map(aligned, maxima))
        buffers.append(buffer)
    return weights, state, max(buffers), sum(buffers)


__all__ = [
    "CHECKPOINT_COPY",
    "CUDA_CONTEXT",
    "EMBEDDINGS",
    "INPUTS",
    "STREAMED",
    "Ledger",
    "fetched_bytes",
    "ledger",
    "weight_bytes",
]
