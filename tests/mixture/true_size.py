"""Layers of a LLaMA-7B at their true size without data, and what a pass through them costs, counted exactly."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from live_bytes import LiveBytes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import mm_flop
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from qd2mora.base import SHAPES
from qd2mora.memory.lean import make_lean
from qd2mora.mixture import MixtureConfig, MixtureLinear, Routing
from qd2mora.mixture.penalties import groups_of, pairwise_overlap

HIDDEN, WIDE, TOKENS = 4096, 11008, 1024

MIB = 2**20

VIEWS = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "slice",
    "split",
    "split_with_sizes",
    "unsqueeze",
    "squeeze",
    "detach",
}

VIEWS |= {
    "device",
    "expand",
    "permute",
    "select",
    "alias",
    "as_strided",
    "unbind",
    "unsafe_split",
    "chunk",
    "unflatten",
}

TARGETS = {
    "none": [],
    "qkv": ["q_proj", "k_proj", "v_proj"],
    "qkvud": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def settings(method: str = "d2mora", down: int = 3, up: int = 8, rank: int = 8) -> MixtureConfig:
    counts = {"down": {"experts": down}, "up": {"experts": up}}
    if method == "mola":  # without its balance loss, which looks at every gate once more
        return MixtureConfig(method=method, rank=rank, allocation=str(up), penalties={"lb_mola": 0.0})
    return MixtureConfig(method=method, rank=rank, **counts)


def four_bit(d_in: int, d_out: int) -> bnb.nn.Linear4bit:
    """A linear whose 4-bit weight has no data: Params4bit cannot wrap a fake tensor, a parameter with a state can."""
    with _disable_current_modes():
        linear = bnb.nn.Linear4bit(2, 2, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    num_blocks = d_in * d_out // 64
    scales = QuantState(torch.empty(-(-num_blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
    weight = nn.Parameter(torch.empty(d_in * d_out // 2, 1, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = QuantState(
        torch.empty(num_blocks, dtype=torch.uint8),
        shape=torch.Size((d_out, d_in)),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.bfloat16,
        offset=torch.empty(()),
        state2=scales,
    )
    del linear.weight
    linear.weight, linear.in_features, linear.out_features = weight, d_in, d_out
    linear.support_avx512bf16_for_cpu = False
    return linear


def adapted(linear: nn.Module, config: MixtureConfig) -> MixtureLinear:
    layer = MixtureLinear(linear, "default", config, Routing())
    return layer.train()


class Calls(TorchDispatchMode):
    """Operations that compute or allocate; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def saved(known: list[Tensor]) -> Iterator[dict[int, Tensor]]:
    """Collect what is kept for the backward pass, each storage once, without parameters and what is known."""
    kept: dict[int, Tensor] = {}
    skip = {tensor.untyped_storage()._cdata for tensor in known}

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in skip:
            kept[key] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def num_bytes(kept: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def run_linear(config: MixtureConfig, watch: Callable[[], Any], width: int = HIDDEN) -> Any:
    """Run forward and backward of one linear under `watch()`, and return what it yields."""
    with FakeTensorMode():
        layer = adapted(four_bit(width, width), config)
        x = torch.empty(1, TOKENS, width, dtype=torch.bfloat16, requires_grad=True)
        with watch() as seen:
            y = layer(x)
            y.backward(torch.empty_like(y))
        return seen


def addmm_flop(self_shape: Any, a_shape: Any, b_shape: Any, **_: Any) -> int:
    return mm_flop(a_shape, b_shape)


def decoder_layer(targets: str, lean: bool = False) -> tuple[LlamaDecoderLayer, list[MixtureLinear]]:
    config = SHAPES["llama-7b"].config()
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    layer = LlamaDecoderLayer(config, 0).requires_grad_(False).train()
    torch.set_default_dtype(torch.float32)
    if lean:
        make_lean(layer)
    found = []
    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            linear: nn.Module = four_bit(module.in_features, module.out_features)
            parent, _, child = name.rpartition(".")
            if child in TARGETS[targets]:
                linear = adapted(linear, settings())
                found.append(linear)
            setattr(layer.get_submodule(parent), child, linear)
    return layer, found


def run_decoder_layer(
    targets: str, tokens: int, backward: bool, lean: bool = False
) -> tuple[int, dict[torch.dtype, int]]:
    """Return peak bytes, or without backward saved bytes by dtype beyond the layer's input and its frozen weights."""
    with FakeTensorMode():
        layer, _ = decoder_layer(targets, lean)
        x = torch.empty(1, tokens, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        places = torch.arange(tokens).unsqueeze(0)
        rotary = LlamaRotaryEmbedding(SHAPES["llama-7b"].config())(x.detach(), places)
        if not backward:
            with saved([x, *layer.parameters(), *layer.buffers(), *rotary]) as kept:
                layer(x, position_embeddings=rotary)
            by_dtype: dict[torch.dtype, int] = {}
            for tensor in kept.values():
                by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor.untyped_storage().nbytes()
            return 0, by_dtype
        with LiveBytes() as live:
            y = layer(x, position_embeddings=rotary)
            y = y[0] if isinstance(y, tuple) else y
            y.backward(torch.empty_like(y))
        return live.peak, {}


def penalty_operations(num_layers: int, num_experts: int) -> list[str]:
    with FakeTensorMode():
        shapes = [(num_experts, 8, HIDDEN), (num_experts, 8, WIDE), (num_experts, HIDDEN, 8), (num_experts, WIDE, 8)]
        banks = [torch.empty(shape, requires_grad=True) for shape in shapes for _ in range(num_layers)]
        with Calls() as calls:
            for group in groups_of(banks):
                torch.autograd.grad(pairwise_overlap(group), group)
    return calls.names
