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


@dataclass(frozen=True)
class Form:
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


def form_of(linear: nn.Module) -> Form | None:
    """Return a linear's form; None where its own forward must run: trained, hooked, packed, or of another kind."""
    if not isinstance(linear, nn.Linear) or _is_watched(linear):
        return None
    bias: Any = linear.bias
    if linear.weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    if type(linear) is nn.Linear and type(linear.weight) is nn.Parameter:
        return Form(linear.weight.dtype, (linear.out_features, linear.in_features), bias is not None)
    return _four_bit_form(linear)


def tensors_of(linear: nn.Linear, form: Form) -> list[Tensor]:
    """Return the tensors that `form` speaks of."""
    weight: Any = linear.weight
    tensors = [weight]
    if form.blocksize:
        state = weight.quant_state
        tensors.append(state.absmax)
        if form.nested:
            tensors += [state.offset, state.state2.absmax, state.state2.code]
    return [*tensors, linear.bias] if form.has_bias else tensors


def weight(form: Form, tensors: list[Tensor]) -> Tensor:
    """Return the dense weight (O, D) in the product's dtype: the tensor itself, or a fresh one where it is 4-bit."""
    if not form.blocksize:
        return tensors[0]
    from bitsandbytes.functional import QuantState, dequantize_4bit

    second = offset = None
    if form.nested:
        offset, absmax, code = tensors[2:5]
        second = QuantState(absmax, code=code, blocksize=form.nested, dtype=torch.float32)
    state = QuantState(
        tensors[1],
        shape=torch.Size(form.shape),
        blocksize=form.blocksize,
        quant_type=form.quant_type,
        dtype=form.dtype,
        offset=offset,
        state2=second,
    )
    # A first axis of 1 would make bitsandbytes return the transpose.
    return dequantize_4bit(tensors[0].view(-1, 1), state)


def product(form: Form, tensors: list[Tensor], x: Tensor) -> Tensor:
    """Return W x + b, (..., O), fresh, in the dtype of x."""
    bias = tensors[-1].to(form.dtype) if form.has_bias else None
    return F.linear(x.to(form.dtype), weight(form, tensors), bias).to(x.dtype)


def input_gradient(form: Form, tensors: list[Tensor], dy_TO: Tensor) -> Tensor:
    """Return dy W, (T, D), fresh, in the dtype of dy."""
    return (dy_TO.to(form.dtype) @ weight(form, tensors)).to(dy_TO.dtype)


def _is_watched(linear: nn.Module) -> bool:
    """Tell whether somebody hooked the linear: parameter gathering, offloading, statistics. There is no public list."""
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return any(hooks) or "forward" in linear.__dict__


def _four_bit_form(linear: nn.Linear) -> Form | None:
    weight: Any = linear.weight
    # Only a 4-bit linear has both; its subclasses may do something else in their forward, so the class must match.
    if type(linear).__name__ not in ("Linear4bit", "LinearNF4", "LinearFP4") or not hasattr(weight, "quant_state"):
        return None
    state, module = weight.quant_state, linear
    compute: Any = module.compute_dtype
    # Without a quantisation state the module finds it itself, and without a compute dtype it takes the first input's.
    if state is None or compute not in _FOUR_BIT_DTYPES or tuple(state.shape) != (linear.out_features, linear.in_features):
        return None
    if hasattr(state, "packing_format_for_cpu") and state.packing_format_for_cpu:
        return None
    nested = state.state2.blocksize if state.nested else 0
    return Form(compute, tuple(state.shape), linear.bias is not None, state.blocksize, nested, state.quant_type)


__all__ = ["Form", "form_of", "input_gradient", "product", "tensors_of", "weight"]
