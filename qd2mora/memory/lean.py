"""Norms and gated products of decoder layers that keep what they read, and nothing they could make again.

transformers' RMSNorm keeps a float32 copy of its input, and its MLP the activated gate beside gate and up: a quarter of
what a layer keeps for its backward pass. Here a norm keeps its input, which the residual sum made anyway, with one
factor a token, and the gated product keeps gate and up. The forward pass runs the same operations, to the bit; so does
the gradient of the gated product, and that of a norm is off by roundings alone: it is computed in float32 throughout.
On a GPU both are kernels of one launch each way (`lean_kernel`), equal up to float32 rounding.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.activations import GELUTanh, SiLUActivation

from qd2mora.base.families import FAMILIES, Family, NormForm
from qd2mora.mixture.kernels import kernels_for

AT_ONCE = 1 << 23
"""Entries of a norm in float32 at once, 32 MiB: its temporaries do not grow with the tokens."""


def make_lean(model: nn.Module) -> None:
    """Let a model's norms and MLPs of known classes keep less. Parameters, names and results stay."""
    # transformers (5.24) lets the attention of a model be chosen by name, its norms and MLPs not: until it does, the
    # class of a module that is there is all that can be changed without touching its parameters' names.
    for module in model.modules():
        lean = _lean_kind(type(module))
        if lean is not None and _has_known_activation(module):
            module.__class__ = lean


def is_lean(model: nn.Module) -> bool:
    """Whether the decoder layers of a model are such that `make_lean` changes them."""
    return any(
        isinstance(module, _LeanMLP) or (_family_of(type(module), "MLP") is not None and _has_known_activation(module))
        for module in model.modules()
    )


_LEAN: dict[type, type[nn.Module] | None] = {}


def _lean_kind(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Return a class of transformers' with a lean forward in front of its own; None where it is no known one."""
    if kind not in _LEAN:
        _LEAN[kind] = _made_lean(kind)
    return _LEAN[kind]


def _made_lean(kind: type[nn.Module]) -> type[nn.Module] | None:
    family = _family_of(kind, "RMSNorm")
    if family is not None:
        return type(f"Lean{kind.__name__}", (_LeanNorm, kind), {"form": family.norm})
    family = _family_of(kind, "MLP")
    if family is not None:
        lean = _LeanFusedMLP if family.fuses_projections else _LeanMLP
        return type(f"Lean{kind.__name__}", (lean, kind), {})
    return None


def _family_of(kind: type, part: str) -> Family | None:
    """Return the family whose norm or MLP a class is: by transformers' own naming, in its own module."""
    for family in FAMILIES:
        if kind.__name__ == f"{family.prefix}{part}" and kind.__module__ == family.module:
            return family
    return None


def _has_known_activation(module: nn.Module) -> bool:
    """Whether a module has an activation whose gradient is known here, or none at all."""
    activation = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    return activation is None or isinstance(activation, nn.SiLU | SiLUActivation | GELUTanh)


class _LeanNorm(nn.Module):
    weight: nn.Parameter
    variance_epsilon: float
    form: NormForm

    def forward(self, hidden_states: Tensor) -> Tensor:
        # The lean one makes no gradient of the weight.
        if self.weight.requires_grad:
            plain: Tensor = super().forward(hidden_states)
            return plain
        # Gemma's norms call it otherwise.
        eps = getattr(self, "eps", None) or self.variance_epsilon
        # Gemma 3 norms heads after it has put them before the tokens. In the order of memory the same numbers come out,
        # and attention, whose result lies as its queries do, needs no copy of it.
        is_swapped = hidden_states.dim() == 4 and not hidden_states.is_contiguous()
        if is_swapped:
            hidden_states = hidden_states.transpose(1, 2)
        normed: Tensor = _Norm.apply(hidden_states, self.weight, eps, self.form)
        return normed.transpose(1, 2) if is_swapped else normed


class _LeanMLP(nn.Module):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        is_gelu = isinstance(self.act_fn, GELUTanh)
        down: Tensor = self.down_proj(gated(self.gate_proj(x), self.up_proj(x), is_gelu=is_gelu))
        return down


class _LeanFusedMLP(nn.Module):
    """One projection to gate and up, side by side (Phi-3)."""

    gate_up_proj: nn.Module
    down_proj: nn.Module
    activation_fn: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        down: Tensor = self.down_proj(gated(gate, up, is_gelu=isinstance(self.activation_fn, GELUTanh)))
        return down


def gated(gate: Tensor, up: Tensor, *, is_gelu: bool = False) -> Tensor:
    """Return act(gate) * up, keeping both for the backward pass and nothing else; act is silu, or the tanh gelu."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        return _activated(gate, is_gelu) * up
    product: Tensor = _Gated.apply(gate, up, is_gelu)
    return product


def _activated(gate: Tensor, is_gelu: bool) -> Tensor:
    if is_gelu:
        return F.gelu(gate, approximate="tanh")
    return F.silu(gate)


class _Norm(torch.autograd.Function):
    """w x / sqrt(mean(x^2) + eps) over the last axis, w (or 1 + w) frozen. Accumulates in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, form: NormForm) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        kept = torch.promote_types(x.dtype, weight.dtype) if form == "rounded first" else x.dtype
        kernel = _kernel_for(rows)
        if kernel is None:
            out, factor = _normed(rows, weight, eps, form, kept)
        else:
            out, factor = kernel.norm(rows.contiguous(), weight, eps, form, kept)
        ctx.save_for_backward(x, factor)
        ctx.weight, ctx.form = weight, form  # frozen: hooks that move saved tensors away would move it
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        x, factor = ctx.saved_tensors
        rows, dy = (tensor.reshape(-1, x.shape[-1]) for tensor in (x, gradients[0]))
        kernel = _kernel_for(rows)
        if kernel is not None:
            dx: Tensor = kernel.norm_back(dy.contiguous(), rows.contiguous(), factor, ctx.weight, ctx.form)
            return dx.view(x.shape), None, None, None
        dx, weight = torch.empty_like(rows), _weight_of(ctx.weight, ctx.form)
        for part in _parts(rows):
            # With f = (mean x^2 + eps)^-1/2 and n = x f: dx = f (w dy - n mean(w dy n)).
            dnormed = dy[part].float() * weight
            normed = rows[part] * factor[part]
            along = (dnormed * normed).mean(-1, keepdim=True)
            torch.mul(dnormed.sub_(normed.mul_(along)), factor[part], out=dx[part])
        return dx.view(x.shape), None, None, None


def _normed(rows: Tensor, weight: Tensor, eps: float, form: NormForm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return w x f (T, D) in `dtype` and f (T, 1) float32 of x (T, D)."""
    out = torch.empty_like(rows, dtype=dtype)
    factor = torch.empty(len(rows), 1, dtype=torch.float32, device=rows.device)
    for part in _parts(rows):
        wide = rows[part].to(torch.float32)
        factor[part] = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        # In transformers' order, to the bit: each family rounds to x's dtype before its weight or after it.
        normed = wide * factor[part]
        if form == "rounded first":
            torch.mul(weight, normed.to(rows.dtype), out=out[part])
        else:
            out[part] = normed.mul_(_weight_of(weight, form))
    return out, factor


def _kernel_for(rows: Tensor) -> ModuleType | None:
    """Return the kernels that take these rows; None where torch does it: without Triton, or in another dtype."""
    if rows.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return None
    kernel = kernels_for(rows, "memory.lean_kernel")
    if kernel is None or rows.shape[-1] > kernel.WIDEST or not rows.numel():
        return None
    return kernel


def _weight_of(weight: Tensor, form: NormForm) -> Tensor:
    """Return what normed numbers are multiplied by: Gemma stores it less one."""
    if form == "one more than its weight":
        return 1.0 + weight.float()
    return weight


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, is_gelu: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.is_gelu = is_gelu
        rows = _row_pair(gate, up)
        if rows is None:
            return _activated(gate, is_gelu).mul_(up)
        kernel, *pair = rows
        out: Tensor = kernel.gated(*pair, is_gelu=is_gelu)
        return out.view(gate.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        rows = _row_pair(gate, up)
        if rows is not None:
            kernel, *pair = rows
            dy = gradients[0].reshape(-1, gate.shape[-1]).contiguous()
            both = kernel.gated_back(dy, *pair, is_gelu=ctx.is_gelu)
            return both[0].view(gate.shape), both[1].view(gate.shape), None
        dgate = gradients[0] * up
        # Over what it reads: one tensor of the MLP's width less where a layer's backward pass is at its peak.
        if ctx.is_gelu:
            torch.ops.aten.gelu_backward.grad_input(dgate, gate, approximate="tanh", grad_input=dgate)
        else:
            torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        return dgate, _activated(gate, ctx.is_gelu).mul_(gradients[0]), None


def _row_pair(gate: Tensor, up: Tensor) -> tuple[ModuleType, Tensor, Tensor] | None:
    """Return the kernels with gate and up as rows, (T, D) views; None where torch does it."""
    kernel = _kernel_for(gate)
    if kernel is None or gate.stride(-1) != 1 or up.stride(-1) != 1:
        return None
    return kernel, gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])


def _parts(rows: Tensor) -> list[slice]:
    number = max(1, AT_ONCE // rows.shape[-1])
    return [slice(start, start + number) for start in range(0, len(rows), number)]


__all__ = ["AT_ONCE", "gated", "is_lean", "make_lean"]
