"""A frozen linear's product and its gradient to the input, as pure functions of tensors that keep nothing.

Dense weights, and 4-bit ones of bitsandbytes through its public dequantise: the dense weight lives for one product, and
is made again in the backward pass. The output is bitwise that of the linear's own forward on a CPU.

Deviation from bitsandbytes 0.50: its backward pass dequantises in the dtype that was quantised, its forward pass in
that of the product; here both use the latter, so that the gradient is that of what ran.

Shapes: T tokens, D d_in, O d_out.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

# bitsandbytes 0.50 takes a float64 compute dtype and returns memory it never wrote.
_FOUR_BIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Slices of W on a CPU, see `_cuts`: dequantising a weight of 4096 x 4096 takes 7 ms instead of 45 in a forward and
# backward pass (one thread). Few tokens go through another product there, so they see W whole.
CACHED_BYTES, MIN_ROWS, MIN_TOKENS = 16 << 20, 64, 32


@dataclass(frozen=True)
class WeightLayout:
    """What the tensors of a frozen linear mean: weight, then the quantisation's, then the bias.

    `dtype` is the product's; `shape` (O, D); `blocksize` 0 is a dense weight, `nested` the blocksize of doubly
    quantised scales, 0 where they are plain.
    """

    dtype: torch.dtype
    shape: tuple[int, int]
    has_bias: bool
    blocksize: int = 0
    nested: int = 0
    quant_type: str = ""


def layout_of(linear: nn.Module) -> WeightLayout | None:
    """Return a linear's layout; None where its own forward must run: trained, hooked, packed, or of another kind."""
    if not isinstance(linear, nn.Linear) or _is_watched(linear):
        return None
    # A trained weight or bias needs a gradient of its own, which nothing here makes.
    if any(parameter.requires_grad for parameter in linear.parameters(recurse=False)):
        return None
    # Exact types: a subclass, or a weight that is a tensor subclass (DTensor, torchao's), may multiply in its own way.
    if type(linear) is nn.Linear and type(linear.weight) is nn.Parameter:
        shape, has_bias = (linear.out_features, linear.in_features), linear.bias is not None
        return WeightLayout(linear.weight.dtype, shape, has_bias)
    return _four_bit_layout(linear)


def tensors_of(linear: nn.Module, layout: WeightLayout | None) -> list[Tensor]:
    """Return the tensors that `layout` speaks of; none without one."""
    if layout is None:
        return []
    assert isinstance(linear, nn.Linear)
    # In the order that `_scales` and `product` take them apart.
    tensors: list[Tensor] = [linear.weight]
    if layout.blocksize:
        packed: Any = linear.weight
        state = packed.quant_state
        tensors.append(state.absmax)
        if layout.nested:
            tensors += [state.offset, state.state2.absmax, state.state2.code]
    if layout.has_bias:
        tensors.append(linear.bias)
    return tensors


def weight(layout: WeightLayout, tensors: list[Tensor]) -> Tensor:
    """Return the dense weight (O, D) in the product's dtype: the tensor itself, or a fresh one where it is 4-bit."""
    if not layout.blocksize:
        return tensors[0]
    return _rows(layout, tensors, _scales(layout, tensors), 0, layout.shape[0])


def product(layout: WeightLayout, tensors: list[Tensor], x: Tensor) -> Tensor:
    """Return W x + b, (..., O), fresh, in the dtype of x."""
    bias = None
    if layout.has_bias:
        bias = tensors[-1].to(layout.dtype)
    x_TD, cuts = flat(x).to(layout.dtype), _cuts(layout, tensors[0])
    if x_TD.shape[0] < MIN_TOKENS or len(cuts) == 1:
        # As nn.Linear itself would, so that a base without an adapter and one with B = 0 agree to the bit.
        return F.linear(x.to(layout.dtype), weight(layout, tensors), bias).to(x.dtype)
    y_TO, scales = x_TD.new_empty(x_TD.shape[0], layout.shape[0]), _scales(layout, tensors)
    for start, stop in cuts:
        W_rows, out = _rows(layout, tensors, scales, start, stop), y_TO[:, start:stop]
        if bias is None:
            torch.mm(x_TD, W_rows.T, out=out)
        else:
            torch.addmm(bias[start:stop], x_TD, W_rows.T, out=out)
    return y_TO.view(*x.shape[:-1], -1).to(x.dtype)


def input_gradient(layout: WeightLayout, tensors: list[Tensor], dy_TO: Tensor, into_TD: Tensor | None = None) -> Tensor:
    """Return dy W, (T, D), in the dtype of dy: fresh, or added to a tensor that is given, in place where it can be."""
    dy_TO, dtype, cuts, scales = dy_TO.to(layout.dtype), dy_TO.dtype, _cuts(layout, tensors[0]), None
    dx_TD = into_TD
    if dx_TD is not None:
        dx_TD = dx_TD.to(layout.dtype)
    if len(cuts) > 1:
        scales = _scales(layout, tensors)
    for start, stop in cuts:
        W_rows = weight(layout, tensors) if scales is None else _rows(layout, tensors, scales, start, stop)
        part_TO = dy_TO[:, start:stop]
        if dx_TD is None:
            dx_TD = part_TO @ W_rows
        else:
            dx_TD = dx_TD.addmm_(part_TO, W_rows)
        del W_rows  # before the next slice is made
    assert dx_TD is not None
    return dx_TD.to(dtype)


def _cuts(layout: WeightLayout, packed: Tensor) -> list[tuple[int, int]]:
    """Return the rows of W to dequantise at once: all, but on a CPU in float32 as many as its cache holds.

    A slice stays in the cache between the dequantiser that writes it and the product that reads it, and the allocator
    gives its memory back to the next slice, where a whole weight is fetched anew from the system, page by page. The
    backward pass adds up slices, which 16 bits would round. No slice is thin: thin products add in another order.
    """
    d_out, d_in = layout.shape
    whole_blocks = layout.blocksize and d_in % layout.blocksize == 0 and d_in % 2 == 0 and packed.dtype is torch.uint8
    if not whole_blocks or packed.device.type != "cpu" or layout.dtype is not torch.float32:
        return [(0, d_out)]
    num_rows = max(MIN_ROWS, CACHED_BYTES // (4 * d_in) // MIN_ROWS * MIN_ROWS)
    starts = list(range(0, max(1, d_out - MIN_ROWS + 1), num_rows))
    return list(zip(starts, [*starts[1:], d_out], strict=True))


def _scales(layout: WeightLayout, tensors: list[Tensor]) -> Tensor:
    """Return the scale of each block of 4-bit weights, float32."""
    if not layout.nested:
        return tensors[1]
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    # Doubly quantised (QLoRA, arXiv 2305.14314): scales are 8-bit numbers about their mean, with scales of their own.
    offset, absmax, code = tensors[2:5]
    second = QuantState(absmax, code=code, blocksize=layout.nested, dtype=torch.float32)
    return dequantize_blockwise(tensors[1], second) + offset


def _rows(layout: WeightLayout, tensors: list[Tensor], scales: Tensor, start: int, stop: int) -> Tensor:
    """Return rows of the dense weight, fresh; all of them in any layout, some where `_cuts` says so."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    # (N, 1): a first axis of 1 would make bitsandbytes return the transpose.
    packed_N1, d_in = tensors[0].view(-1, 1), layout.shape[1]
    if stop - start < layout.shape[0]:
        # Two weights a byte and one scale a block; `_cuts` cuts where no block is cut.
        packed_N1 = packed_N1[start * d_in // 2 : stop * d_in // 2]
        scales = scales[start * d_in // layout.blocksize : stop * d_in // layout.blocksize]
    shape = torch.Size((stop - start, d_in))
    state = QuantState(
        scales, shape=shape, blocksize=layout.blocksize, quant_type=layout.quant_type, dtype=layout.dtype
    )
    return dequantize_4bit(packed_N1, state)


def flat(tensor: Tensor) -> Tensor:
    """Return (..., width) as (tokens, width), whatever leads, even nothing."""
    return tensor.reshape(-1, tensor.shape[-1])


def _is_watched(linear: nn.Module) -> bool:
    """Tell whether somebody hooked the linear: parameter gathering, offloading, statistics. There is no public list."""
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    # accelerate's offloading replaces `forward` on the instance, which no hook list shows.
    return any(hooks) or "forward" in linear.__dict__


def _four_bit_layout(linear: nn.Linear) -> WeightLayout | None:
    # Only a 4-bit linear has both; its subclasses may do something else in their forward, so the class must match.
    is_four_bit = type(linear).__name__ in ("Linear4bit", "LinearNF4", "LinearFP4")
    if not is_four_bit or not hasattr(linear.weight, "quant_state"):
        return None
    module: Any = linear  # bitsandbytes has no types
    state, dtype = module.weight.quant_state, module.compute_dtype
    shape = (linear.out_features, linear.in_features)
    # Without a quantisation state the module finds it itself, and without a compute dtype it takes the first input's.
    if state is None or dtype not in _FOUR_BIT_DTYPES or tuple(state.shape) != shape:
        return None
    # The layout that bitsandbytes 0.50 makes for AVX512 is undone by no public function.
    if hasattr(state, "packing_format_for_cpu") and state.packing_format_for_cpu:
        return None
    nested = 0
    if state.nested:
        nested = state.state2.blocksize
    if nested not in (0, 256):  # bitsandbytes refuses others in its own product
        return None
    return WeightLayout(dtype, shape, linear.bias is not None, state.blocksize, nested, state.quant_type)


__all__ = ["WeightLayout", "flat", "input_gradient", "layout_of", "product", "tensors_of", "weight"]
