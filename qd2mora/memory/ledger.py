"""The ledger: what a training step keeps in memory, item by item in bytes, from shapes alone.

The model and its adapters are built on the meta device, by the code that builds the real ones, so that grouped heads,
tied embeddings, targets and trainable tensors are right by construction; no weight is read.

A step has three moments that can be its peak: the loss, the backward pass through the last layer, and the gradient of
the orthogonality penalty. What is alive at the greatest of them is the plan; the others' items are told apart.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from qd2mora.memory.activations import (
    FLOAT,
    LayerShapes,
    Pass,
    all_layers_bytes,
    backward_bytes,
    layer_inputs_bytes,
    loss_bytes,
    recomputed_bytes,
)
from qd2mora.mixture import MixtureConfig, add_adapter, mixture_layers
from qd2mora.mixture.ops import RankStep
from qd2mora.recipe import Recipe

BLOCK, NESTED_BLOCK = 64, 256
CODE_BOOK, NESTED_TABLES = 16 * 4, 256 * 4 + 4
"""NF4's 16 values; with double quantisation the 256 values of the maxima, and their offset. Each tensor has its own."""
MOMENT_BLOCK, SMALLEST_8BIT = 256, 4096
"""bitsandbytes keeps one float32 maximum for each block of moments, and 32-bit moments of smaller tensors."""
MOMENT_TABLES = 2 * 256 * 4
CUDA_CONTEXT = 512 << 20
"""Driver, kernels and cuBLAS workspace: 0.3 to 0.6 GiB by card and driver."""

Moment = Literal["loss", "backward", "penalty"]


@dataclass(frozen=True)
class Linear:
    """A linear by its name in the model."""

    name: str
    d_in: int
    d_out: int

    @property
    def entries(self) -> int:
        """Weights in it."""
        return self.d_in * self.d_out


@dataclass(frozen=True)
class Shapes:
    """What the ledger needs of an adapted model; `linears` are all but the output head."""

    linears: tuple[Linear, ...]
    layer: LayerShapes
    num_layers: int
    vocab: int
    embedding_entries: int
    head_entries: int
    other_entries: int
    trainable: tuple[int, ...]
    """Entries of each trainable tensor."""
    penalised: tuple[int, ...]
    """Entries of the banks that the orthogonality penalty reads: those of more than one expert, summed by shape."""
    normed: int = 0
    """Entries of the largest weight whose row norms DoRA takes in every pass."""

    @property
    def largest_linear(self) -> int:
        """Entries of the largest decoder linear."""
        return max(linear.entries for linear in self.linears)


@dataclass(frozen=True)
class Setting:
    """What the planner decides, and the dtype of products."""

    micro_batch: int
    checkpointing: bool
    dtype: torch.dtype
    on_gpu: bool


@dataclass(frozen=True)
class Ledger:
    """Bytes by item: those alive at the peak, and those of the step's other moments."""

    items: dict[str, int]
    elsewhere: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """The sum of what is alive at the peak."""
        return sum(self.items.values())


def read_shapes(config: PretrainedConfig, adapter: MixtureConfig) -> Shapes:
    """Build the adapted model on the meta device and take its shapes.

    Raises InputRefused where a target matches no linear.
    """
    by_peft = adapter.row.backend == "peft"  # DoRA: a LoRA, and a magnitude for each output
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight
        head_entries = 0 if head.weight is embedding else head.weight.numel()
        linears = tuple(
            Linear(name, module.in_features, module.out_features)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        )
        num_frozen = sum(tensor.numel() for tensor in model.parameters())
        layers = mixture_layers(add_adapter(model, replace(adapter, method="lora") if by_peft else adapter, seed=0))
    tensors = [pair for layer in layers.values() for pair in layer.tensors("default").items() if pair[1].requires_grad]
    steps = [layer.mixture_spec["default"].step for layer in layers.values()]
    return Shapes(
        linears=linears,
        layer=_layer_shapes(config, linears, {name: layer.in_features for name, layer in layers.items()}, steps),
        num_layers=config.num_hidden_layers,
        vocab=config.vocab_size,
        embedding_entries=embedding.numel(),
        head_entries=head_entries,
        other_entries=num_frozen - embedding.numel() - head_entries - sum(linear.entries for linear in linears),
        trainable=tuple(tensor.numel() for _, tensor in tensors)
        + tuple(layer.out_features for layer in layers.values() if by_peft),
        normed=max(layer.in_features * layer.out_features for layer in layers.values()) if by_peft else 0,
        penalised=_penalised([tensor for name, tensor in tensors if name in ("mixture_A", "mixture_B")]),
    )


def ledger(shapes: Shapes, recipe: Recipe, setting: Setting) -> Ledger:
    """Return the bytes of every item of a training step on rows of `data.max_length` tokens, all of them labelled."""
    done = Pass(
        rows=setting.micro_batch,
        length=recipe.data.max_length,
        item=setting.dtype.itemsize,
        dropout=recipe.adapter.dropout > 0,
    )
    items = weight_bytes(shapes, recipe, done.item) | trainable_bytes(shapes.trainable, recipe.train.optimizer)
    if setting.on_gpu:
        items["CUDA context"] = CUDA_CONTEXT
    if setting.checkpointing:
        kept = {"layer inputs": layer_inputs_bytes(shapes.layer, done, shapes.num_layers)}
        backward = {"one layer recomputed": recomputed_bytes(shapes.layer, done)}
    else:
        kept = {"activations": all_layers_bytes(shapes.layer, done, shapes.num_layers)}
        backward = {}
    is_nf4 = recipe.base.quantization == "nf4"
    dequantised = dequantised_bytes(shapes.largest_linear, recipe.base.double_quant, done.item) if is_nf4 else 0
    # PEFT's DoRA holds the weight, the update, the update scaled and their sum at once.
    norms = {"row norms of weights": 4 * shapes.normed * done.item} if shapes.normed else {}
    moments: dict[Moment, dict[str, int]] = {
        "loss": kept | {"logits and loss": loss_bytes(shapes.layer.hidden, shapes.vocab, done)},
        "backward": kept | norms | backward | backward_bytes(shapes.layer, done, dequantised),
        "penalty": {"orthogonality penalty": penalty_bytes(shapes.penalised, _penalty_weight(recipe))},
    }
    peak = max(moments.values(), key=lambda moment: sum(moment.values()))
    others = {name: size for moment in moments.values() for name, size in moment.items() if name not in peak}
    return Ledger(items | peak, others)


def weight_bytes(shapes: Shapes, recipe: Recipe, item: int) -> dict[str, int]:
    """Return the frozen model's bytes by kind; `item` bytes an entry for what is not 4-bit."""
    items = {}
    if recipe.base.quantization == "nf4":
        sizes = [nf4_bytes(linear.entries, recipe.base.double_quant) for linear in shapes.linears]
        items["4-bit weights"] = sum(packed for packed, _ in sizes)
        items["quantisation state"] = sum(state for _, state in sizes)
    else:
        items["linear weights"] = item * sum(linear.entries for linear in shapes.linears)
    items["embeddings"] = item * shapes.embedding_entries
    items["output head"] = item * shapes.head_entries
    items["norms and biases"] = item * shapes.other_entries
    return items


def nf4_bytes(entries: int, double_quant: bool) -> tuple[int, int]:
    """Return (packed weights, quantisation state) of one tensor.

    Half a byte a weight, and for each 64 weights a float32 maximum; with double quantisation one byte instead, and a
    float32 for each 256 of those.
    """
    blocks = -(-entries // BLOCK)
    if double_quant:
        return -(-entries // 2), blocks + 4 * -(-blocks // NESTED_BLOCK) + CODE_BOOK + NESTED_TABLES
    return -(-entries // 2), 4 * blocks + CODE_BOOK


def dequantised_bytes(entries: int, double_quant: bool, item: int) -> int:
    """Return the bytes of one weight while it is dequantised: itself, and its block maxima as float32."""
    return entries * item + (4 * -(-entries // BLOCK) if double_quant else 0)


def trainable_bytes(tensors: tuple[int, ...], optimizer: str) -> dict[str, int]:
    """Return the bytes of float32 adapters, their gradients and the moments; `tensors` are entries of each."""
    return {
        "adapters": 4 * sum(tensors),
        "gradients": 4 * sum(tensors),
        "optimizer state": optimizer_bytes(tensors, optimizer),
    }


def optimizer_bytes(tensors: tuple[int, ...], optimizer: str) -> int:
    """Return the bytes of both moments; paged moments count in full, as they are while there is room.

    PyTorch's fused AdamW keeps a float32 step counter for each tensor besides.
    """
    if optimizer == "adamw":
        return 8 * sum(tensors) + 4 * len(tensors)
    large = [entries for entries in tensors if entries >= SMALLEST_8BIT]
    blocks = sum(-(-entries // MOMENT_BLOCK) for entries in large)
    small = sum(tensors) - sum(large)
    return 2 * sum(large) + 8 * blocks + (MOMENT_TABLES if large else 0) + 8 * small


def penalty_bytes(groups: tuple[int, ...], weight: float) -> int:
    """Return the bytes of the penalty and its gradient; `groups` are entries of the banks of one shape.

    Each group is stacked and kept; its gradient comes as two halves that are added. Without a weight the penalty is
    only read, one group after the other.
    """
    largest = max(groups, default=0)
    return FLOAT * (sum(groups) + 2 * largest if weight > 0 else largest)


def _penalised(banks: list[torch.Tensor]) -> tuple[int, ...]:
    groups: Counter[torch.Size] = Counter()
    for bank in banks:
        if bank.dim() == 3 and bank.shape[0] > 1:
            groups[bank.shape] += bank.numel()
    return tuple(groups.values())


def _penalty_weight(recipe: Recipe) -> float:
    config = MixtureConfig.from_recipe(recipe.adapter, len(recipe.data.tasks))
    return sum(penalty.weight for penalty in config.weight_penalties if penalty.kind.startswith("diversity"))


def _layer_shapes(
    config: PretrainedConfig, linears: tuple[Linear, ...], adapted: dict[str, int], steps: list[RankStep]
) -> LayerShapes:
    """Take one decoder layer's widths; what adapters read is averaged over the layers."""
    kinds = {linear.name.rpartition(".")[2]: linear for linear in linears}
    # o_proj reads what attention keeps anyway.
    inputs = {_input_of(name): d_in for name, d_in in adapted.items() if not name.endswith(".o_proj")}
    return LayerShapes(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        heads_width=kinds["q_proj"].d_out if "q_proj" in kinds else config.hidden_size,
        adapter_inputs=-(-sum(inputs.values()) // config.num_hidden_layers),
        adapter_features=-(-sum(step.features for step in steps) // config.num_hidden_layers),
        # The code, its gradient and its gated parts; then what goes to the up product, and its gradient.
        rank_space=max(3 * step.features + 2 * step.width_up for step in steps),
        adapts_down=any(name.endswith(".down_proj") for name in adapted),
    )


_READS = {"q_proj": "states", "k_proj": "states", "v_proj": "states", "gate_proj": "states", "up_proj": "states"}
"""Linears of a block that read its normed input."""


def _input_of(name: str) -> str:
    """Name what a linear reads, so that linears which read the same tensor count it once."""
    block, _, kind = name.rpartition(".")
    return f"{block}.{_READS.get(kind, kind)}"


__all__ = [
    "CUDA_CONTEXT",
    "Ledger",
    "Linear",
    "Setting",
    "Shapes",
    "dequantised_bytes",
    "ledger",
    "nf4_bytes",
    "optimizer_bytes",
    "penalty_bytes",
    "read_shapes",
    "trainable_bytes",
    "weight_bytes",
]
