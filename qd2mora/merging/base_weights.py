"""A base's weights one at a time, straight from its files: as trained on (NF4 dequantised) or as they were (original).

No model is built. A weight that training quantised is quantised here by the same call, on the same device and from the
same dtype, so that what comes out is bitwise what the adapter saw; one that is stored in NF4 is only dequantised. Files
are read in plain reads, not mapped: what is in memory is one weight, whatever the size of the model.
"""

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qd2mora.base import base_config, compute_dtype, default_device, dense_weight, local_folder
from qd2mora.base.loading import stored_weights
from qd2mora.errors import InputRefused
from qd2mora.recipe import Base

BLOCK_BYTES = 8 << 20
"""Rows handled at once, in float32."""
NF4_BLOCK = 64
"""Numbers that share one scale in NF4."""

_NF4_MARK = ".quant_state.bitsandbytes__nf4"


class BaseWeights:
    """The weights of one base. `original`: as its files hold them, where training quantised them.

    Raises InputRefused where the files are not there, not whole, or in 4 bits while the original is asked for.
    """

    def __init__(self, base: Base, *, original: bool = False, device: torch.device | None = None) -> None:
        if local_folder(base.model) is None:
            raise InputRefused(f"base.model: the files of '{base.model}' are not on this machine")
        self.base, self.config = base, base_config(base)
        self.device = device or default_device()
        self.dtype = compute_dtype(base, self.device)
        self.stored = stored_weights(base.model)
        self.is_packed = any(name.endswith(_NF4_MARK) for name in self.stored)
        if original and self.is_packed:
            raise InputRefused(
                f"--base original: '{base.model}' is stored in 4 bits; --base dequantized is all there is"
            )
        self.original = original

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        # A tied output matrix must not count as a weight of its own, however a build on the meta device leaves it.
        model.tie_weights()
        self.architecture = type(model).__name__
        # The model's weights by their own names, in its order; tied ones once.
        self.names = [name for name, _ in model.named_parameters()]
        self.linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        missing = [name for name in self.names if name not in self.stored]
        if missing:
            raise InputRefused(f"base.model: '{base.model}' is not whole: no weights for {missing[0]}")

    @property
    def quantized(self) -> set[str]:
        """Names of the weights that the adapter saw in NF4: all linears but the output matrix."""
        if self.base.quantization != "nf4" and not self.is_packed:
            return set()
        # transformers leaves the output matrix in 16 bits, as QLoRA does.
        return {f"{name}.weight" for name in self.linears if name != "lm_head"}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a weight's shape when dense."""
        if name + _NF4_MARK in self.stored:
            return tuple(json.loads(bytes(self.stored[name + _NF4_MARK].read().tolist()))["shape"])
        return self.stored[name].shape

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row and a block of rows, float32 on the CPU, fresh; a vector is one block."""
        if name + _NF4_MARK in self.stored:
            dense = dense_weight(self.linear(name)).cpu()
            return ((start, dense[start:stop]) for start, stop in self._cuts(name))
        if self.original or name not in self.quantized:
            return ((start, self.stored[name].read(start, stop).float()) for start, stop in self._cuts(name))
        return self._through_nf4(name)

    def _cuts(self, name: str) -> list[tuple[int, int]]:
        """Return rows to handle at once: a multiple of 64, so that no quantisation block of 64 numbers is cut."""
        shape = self.shape(name)
        step = shape[0]
        if len(shape) == 2:
            step = max(64, BLOCK_BYTES // (4 * shape[1]) // 64 * 64)
        return [(start, min(shape[0], start + step)) for start in range(0, shape[0], step)]

    def _through_nf4(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yield blocks of a weight quantised and dequantised."""
        # bitsandbytes takes long to import, and exports of original or 16-bit weights never need it.
        from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

        packed, whole = self.quantize(name)
        scales: Tensor = whole.absmax
        if whole.nested:
            scales = dequantize_blockwise(scales, whole.state2) + whole.offset
        width, place = self.shape(name)[1], 0
        for (start, stop), nibbles in zip(self._cuts(name), packed, strict=True):
            shape, size = torch.Size((stop - start, width)), nibbles.numel() * 2 // NF4_BLOCK
            absmax, place = scales[place : place + size], place + size
            state = QuantState(absmax, shape=shape, blocksize=NF4_BLOCK, quant_type="nf4", dtype=self.dtype)
            yield start, dequantize_4bit(nibbles.to(self.device), state).float().cpu()

    def quantize(self, name: str) -> tuple[list[Tensor], Any]:
        """Return a weight as training packed it, (n, 1) uint8 a block of rows on the CPU, and its quantisation state.

        What bitsandbytes makes of the weight as a whole, in blocks of rows: its quantiser needs six times the weight on
        a CPU. Only the second quantisation, of scales, sees all of it. For a base that is stored in 4 bits, as stored.
        """
        if name + _NF4_MARK in self.stored:
            weight: Any = self.linear(name).weight
            return [weight.data.cpu()], weight.quant_state
        from bitsandbytes.functional import QuantState, get_4bit_type, quantize_4bit, quantize_blockwise

        packed, scales = [], []
        for start, stop in self._cuts(name):
            rows = self.stored[name].read(start, stop).to(self.dtype).to(self.device)
            nibbles, state = quantize_4bit(rows, blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=False)
            packed.append(nibbles.cpu())
            scales.append(state.absmax)
        # The offset is the mean of all scales: a block's alone would be another, and so would every rounded scale.
        absmax, offset, second = torch.cat(scales), None, None
        if self.base.double_quant:
            offset = absmax.mean()
            absmax, second = quantize_blockwise(absmax - offset, blocksize=256)
        code, shape = get_4bit_type("nf4", device=self.device), torch.Size(self.shape(name))
        return packed, QuantState(absmax, shape, code, NF4_BLOCK, "nf4", self.dtype, offset, second)

    def linear(self, name: str) -> nn.Linear:
        """Return a 4-bit linear of a base that is stored in 4 bits, on the device."""
        import bitsandbytes as bnb

        # bitsandbytes' own reader of its state: what its tables mean may change with its versions.
        weight = self.stored[name].read()
        state = {each: self.stored[each].read() for each in self.stored if each.startswith(f"{name}.")}
        shape = self.shape(name)
        linear = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, compute_dtype=self.dtype, device="meta")
        packed: Any = bnb.nn.Params4bit.from_prequantized(weight, state, device=self.device, module=linear)
        linear.weight = packed
        return linear


__all__ = ["BaseWeights"]
