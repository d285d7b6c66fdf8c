"""A base of true size without its bytes: FakeTensors, which have a shape, a dtype and a place, and nothing in them.

bitsandbytes' parameter class cannot wrap a FakeTensor, so a 4-bit linear here is its own Linear4bit around a plain
parameter that carries a quantisation state: every product goes through the same operations and asks for the same bytes.
`Counted` counts them: each storage once, from the operation that makes it until it is freed, but for what lives on the
host.
"""

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from bench_parts import LiveBytes
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from qd2mora.base import Shape
from qd2mora.memory.checkpointing import Boundaries

BLOCK, NESTED_BLOCK = 64, 256
COMPUTE = torch.bfloat16


class Counted(LiveBytes):
    """Bytes of the device alone: what is on the host is left out."""

    def __init__(self) -> None:
        super().__init__()
        self._on_host = False

    def beyond(self, run: Callable[[], object]) -> int:
        """Return the most bytes alive at once while `run` runs, beyond those before."""
        before = self.peak = self.now
        run()
        return self.peak - before

    def leave(self, tensors: list[Tensor]) -> None:
        """Count tensors no longer: they are in host memory."""
        for tensor in tensors:
            self._free(tensor.untyped_storage()._cdata)

    def keep_out(self, store: Boundaries) -> None:
        """Do not count the host buffers that a store of layer inputs makes."""
        make = store._buffer

        def buffer(tensor: Tensor) -> Tensor:
            self._on_host = True
            made = make(tensor)
            self._on_host = False
            return made

        store.__dict__["_buffer"] = buffer

    def _add(self, storage: torch.UntypedStorage) -> None:
        if not self._on_host:
            super()._add(storage)


def empty_model(shape: Shape) -> PreTrainedModel:
    """Return the model on the meta device, 16-bit, its linears 4-bit ones without weights: ready for an adapter."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(COMPUTE)
    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(shape.config())
            for name, module in list(model.named_modules()):
                if isinstance(module, nn.Linear) and name != "lm_head":
                    parent, _, child = name.rpartition(".")
                    empty = bnb.nn.Linear4bit(
                        module.in_features, module.out_features, False, compute_dtype=COMPUTE, quant_type="nf4"
                    )
                    setattr(model.get_submodule(parent), child, empty)
    finally:
        torch.set_default_dtype(before)
    model.name_or_path = model.config._name_or_path = ""
    plain: Any = model
    plain.is_loaded_in_4bit = True  # as loading through bitsandbytes has it, for PEFT's preparation
    return model.requires_grad_(False)


def fill(model: nn.Module, decoder: nn.Module) -> None:
    """Give every parameter of an adapted meta model a FakeTensor; to be called among them."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            linear: Any = module
            linear.weight = _packed(linear.in_features, linear.out_features)
            linear.support_avx512bf16_for_cpu = False
        for child, parameter in list(module.named_parameters(recurse=False)):
            if not hasattr(parameter, "quant_state"):
                value = torch.empty(parameter.shape, dtype=parameter.dtype)
                setattr(module, child, nn.Parameter(value, requires_grad=parameter.requires_grad))
    rotary: Any = decoder
    rotary.rotary_emb = type(rotary.rotary_emb)(config=rotary.config)


def _packed(d_in: int, d_out: int) -> nn.Parameter:
    """Return a packed weight with double quantisation and what Linear4bit and the mixture read of one."""
    blocks = d_in * d_out // BLOCK
    weight: Any = nn.Parameter(torch.empty(d_in * d_out // 2, 1, dtype=torch.uint8), requires_grad=False)
    nested = QuantState(
        torch.empty(-(-blocks // NESTED_BLOCK)), code=torch.empty(256), blocksize=NESTED_BLOCK, dtype=torch.float32
    )
    weight.quant_state = QuantState(
        torch.empty(blocks, dtype=torch.uint8),
        shape=torch.Size((d_out, d_in)),
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=COMPUTE,
        offset=torch.empty(()),
        state2=nested,
    )
    packed: nn.Parameter = weight
    return packed


__all__ = ["COMPUTE", "Counted", "empty_model", "fill"]
