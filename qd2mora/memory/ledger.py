"""The ledger: every item of a training step's peak memory, in bytes, from shapes alone.

The model is built on the meta device, so that grouped heads, tied embeddings and any LLaMA-family configuration are
right by construction; no weight is read. Formulas: NF4 takes half a byte a weight plus block maxima (a float32 for
each 64 weights, or with double quantisation a byte for each 64 and a float32 for each 64 * 256) and two small tables.

Units: bytes. `tokens` is micro_batch x max_length, the worst a step can meet.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from qd2mora.errors import InputRefused
from qd2mora.memory.loss import CHUNK
from qd2mora.mixture import MixtureConfig
from qd2mora.mixture.layer import tensor_shapes
from qd2mora.recipe import Recipe

BLOCK, NESTED_BLOCK = 64, 256
TABLES = 16 * 4, 256 * 4 + 4
"""Code book of NF4, and with double quantisation that of the maxima with their offset."""
SMALLEST_8BIT = 4096
"""bitsandbytes keeps the moments of smaller tensors in 32 bits."""
CUDA_CONTEXT = 400 << 20


@dataclass(frozen=True)
class Linear:
    """A linear of a decoder layer, by its name in the model."""

    name: str
    d_in: int
    d_out: int

    @property
    def entries(self) -> int:
        return self.d_in * self.d_out


@dataclass(frozen=True)
class Shapes:
    """What the ledger needs of a model."""

    linears: tuple[Linear, ...]
    adapted: tuple[Linear, ...]
    hidden: int
    intermediate: int
    layers: int
    vocab: int
    heads_width: int
    kv_width: int
    embedding_entries: int
    head_entries: int
    other_entries: int


@dataclass(frozen=True)
class Setting:
    """What the planner decides, and the dtype of products."""

    micro_batch: int
    checkpointing: bool
    dtype: torch.dtype
    on_gpu: bool


def read_shapes(config: PretrainedConfig, adapter: MixtureConfig) -> Shapes:
    """Build the model on the meta device and take its shapes. Raises InputRefused where a target matches nothing."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linears = tuple(
        Linear(name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    )
    adapted = tuple(linear for linear in linears if _is_target(linear.name, adapter))
    _refuse_unmatched(linears, adapter)
    embedding = model.get_input_embeddings().weight
    counted = sum(linear.entries for linear in linears) + embedding.numel()
    tied = head.weight is embedding
    head_entries = 0 if tied else head.weight.numel()
    return Shapes(
        linears=linears,
        adapted=adapted,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        vocab=config.vocab_size,
        heads_width=_width(linears, "q_proj", config.hidden_size),
        kv_width=_width(linears, "k_proj", config.hidden_size),
        embedding_entries=embedding.numel(),
        head_entries=head_entries,
        other_entries=sum(tensor.numel() for tensor in model.parameters()) - counted - head_entries,
    )


def adapter_tensors(shapes: Shapes, adapter: MixtureConfig) -> list[int]:
    """Return the entries of every trainable tensor."""
    return [
        int(torch.Size(shape).numel())
        for linear in shapes.adapted
        for shape in tensor_shapes(adapter, linear.d_in, linear.d_out).values()
    ]


def ledger(shapes: Shapes, adapter: MixtureConfig, recipe: Recipe, setting: Setting) -> dict[str, int]:
    """Return bytes by item; their sum is the planned peak."""
    trainable = adapter_tensors(shapes, adapter)
    tokens = setting.micro_batch * recipe.data.max_length
    item = setting.dtype.itemsize
    items = _weights(shapes, recipe, item)
    items["adapters"] = 4 * sum(trainable)
    items["gradients"] = 4 * sum(trainable)
    items["optimizer state"] = _optimizer_bytes(trainable, recipe.train.optimizer)
    per_token = layer_activations(shapes, adapter, item)
    if setting.checkpointing:
        items["layer inputs"] = shapes.layers * tokens * shapes.hidden * item
        items["one layer recomputed"] = tokens * per_token
    else:
        items["activations"] = shapes.layers * tokens * per_token
    items["largest weight dequantised"] = max(linear.entries for linear in shapes.linears) * item
    items["logits and loss"] = loss_bytes(shapes, min(tokens, CHUNK), item)
    if setting.on_gpu:
        items["CUDA context"] = CUDA_CONTEXT
    return items


def layer_activations(shapes: Shapes, adapter: MixtureConfig, item: int) -> int:
    """Return bytes a token that one decoder layer keeps for its backward pass.

    Norms keep their input twice (as it came, and in float32 with the factor) and their output; attention keeps q, k, v
    before and after rotation and its output; the MLP keeps gate, up, the activated gate and their product. Adapters
    keep their inputs (shared with the linears', but for what nothing else keeps) and some floats in rank space.
    """
    norms = 2 * (2 * item + 4 + 4) * shapes.hidden
    attention = 2 * item * (shapes.heads_width + shapes.kv_width) + item * (shapes.kv_width + shapes.heads_width)
    mlp = 4 * item * shapes.intermediate
    rank_space = sum(_rank_floats(linear, adapter) for linear in shapes.adapted) * 4 / shapes.layers
    return int(norms + attention + mlp + rank_space)


def loss_bytes(shapes: Shapes, tokens: int, item: int) -> int:
    """Return the bytes of logits in the compute dtype, in float32, their log-softmax and their gradient."""
    return tokens * shapes.vocab * (2 * item + 4 + 4)


def nf4_bytes(entries: int, double_quant: bool) -> tuple[int, int]:
    """Return (packed weights, quantisation state) of one tensor."""
    blocks = -(-entries // BLOCK)
    if double_quant:
        return -(-entries // 2), blocks + 4 * -(-blocks // NESTED_BLOCK) + sum(TABLES)
    return -(-entries // 2), 4 * blocks + TABLES[0]


def _weights(shapes: Shapes, recipe: Recipe, item: int) -> dict[str, int]:
    items = {}
    if recipe.base.quantization == "nf4":
        sizes = [nf4_bytes(linear.entries, recipe.base.double_quant) for linear in shapes.linears]
        items["4-bit weights"] = sum(packed for packed, _ in sizes)
        items["quantisation state"] = sum(state for _, state in sizes)
    else:
        items["linear weights"] = item * sum(linear.entries for linear in shapes.linears)
    items["embeddings"] = item * shapes.embedding_entries
    items["output head"] = item * shapes.head_entries
    items["norms"] = item * shapes.other_entries
    return items


def _optimizer_bytes(trainable: list[int], optimizer: str) -> int:
    if optimizer == "adamw":
        return 8 * sum(trainable)
    # A byte for each moment, a float32 maximum for each 256 of them; the code books are shared.
    return sum(
        8 * entries if entries < SMALLEST_8BIT else 2 * (entries + 4 * -(-entries // 256)) for entries in trainable
    )


def _rank_floats(linear: Linear, adapter: MixtureConfig) -> int:
    """Floats a token of one adapter: u twice, gates, the code, and v twice."""
    assert adapter.rank is not None
    down, up = adapter.num_down * adapter.rank, adapter.num_up * adapter.rank
    return 2 * down + 2 * adapter.num_down + 2 * adapter.rank + 2 * adapter.num_up + 2 * up


def _is_target(name: str, adapter: MixtureConfig) -> bool:
    targets = adapter.target_modules
    if targets == "all-linear":
        return True
    return any(name == target or name.endswith(f".{target}") for target in targets or ())


def _refuse_unmatched(linears: tuple[Linear, ...], adapter: MixtureConfig) -> None:
    if adapter.target_modules == "all-linear":
        return
    kinds = sorted({linear.name.rpartition(".")[2] for linear in linears})
    for target in adapter.target_modules or ():
        if not any(linear.name.endswith(f".{target}") for linear in linears):
            raise InputRefused(f"adapter.targets: '{target}' matches no linear; there are {', '.join(kinds)}")


def _width(linears: tuple[Linear, ...], kind: str, default: int) -> int:
    return next((linear.d_out for linear in linears if linear.name.endswith(kind)), default)


__all__ = ["Linear", "Setting", "Shapes", "adapter_tensors", "layer_activations", "ledger", "nf4_bytes", "read_shapes"]
