"""Norms and gated products of decoder layers that keep what they read, and nothing they could make again.

transformers' RMSNorm keeps a float32 copy of its input, and its MLP the activated gate beside gate and up: a quarter of
what a layer keeps for its backward pass. Here a norm keeps its input, which the residual sum made anyway, with one
factor a token, and the gated product keeps gate and up. The forward pass runs the same operations, to the bit; so does
the gradient of the gated product, and that of a norm is off by roundings alone: it is computed in float32 throughout.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

NORMS: tuple[type[nn.Module], ...] = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
MLPS: tuple[type[nn.Module], ...] = (LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP)
"""Classes of one formula each (tested); other families' layers stay as they are."""
AT_ONCE = 1 << 23
"""Entries of a norm in float32 at once, 32 MiB: its temporaries do not grow with the tokens."""


def make_lean(model: nn.Module) -> None:
    """Let a model's norms and MLPs of known classes keep less. Parameters, names and results stay."""
    # transformers (5.24) lets the attention of a model be chosen by name, its norms and MLPs not: until it does, the
    # class of a module that is there is all that can be changed without touching its parameters' names.
    for module in model.modules():
        if type(module) in NORMS:
            module.__class__ = _LEAN[type(module)]
        elif type(module) in MLPS and isinstance(module.act_fn, nn.SiLU | SiLUActivation):
            module.__class__ = _LEAN[type(module)]


def is_lean(model: nn.Module) -> bool:
    """Whether the decoder layers of a model are such that `make_lean` changes them."""
    return any(type(module) in MLPS or isinstance(module, _LeanMLP) for module in model.modules())


class _LeanNorm(nn.Module):
    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        # The lean one makes no gradient of the weight.
        if self.weight.requires_grad:
            plain: Tensor = super().forward(hidden_states)
            return plain
        normed: Tensor = _Norm.apply(hidden_states, self.weight, self.variance_epsilon)
        return normed


class _LeanMLP(nn.Module):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))
        return down


_LEAN: dict[type, type[nn.Module]] = {
    kind: type(f"Lean{kind.__name__}", (lean, kind), {})
    for kinds, lean in ((NORMS, _LeanNorm), (MLPS, _LeanMLP))
    for kind in kinds
}


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, keeping both for the backward pass and nothing else."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        return F.silu(gate) * up
    product: Tensor = _Gated.apply(gate, up)
    return product


class _Norm(torch.autograd.Function):
    """w x / sqrt(mean(x^2) + eps) over the last axis, w frozen. Accumulates in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty_like(rows, dtype=torch.promote_types(x.dtype, weight.dtype))
        factor = torch.empty(len(rows), 1, dtype=torch.float32, device=x.device)
        for part in _parts(rows):
            wide = rows[part].to(torch.float32)
            factor[part] = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
            # In transformers' order, rounded to x's dtype before the weight: to the bit.
            torch.mul(weight, (wide * factor[part]).to(x.dtype), out=out[part])
        ctx.save_for_backward(x, factor)
        ctx.weight = weight  # frozen: hooks that move saved tensors away would move it
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, factor = ctx.saved_tensors
        rows, dy = (tensor.reshape(-1, x.shape[-1]) for tensor in (x, gradients[0]))
        dx = torch.empty_like(rows)
        for part in _parts(rows):
            # With f = (mean x^2 + eps)^-1/2 and n = x f: dx = f (w dy - n mean(w dy n)).
            dnormed = dy[part].float() * ctx.weight
            normed = rows[part] * factor[part]
            along = (dnormed * normed).mean(-1, keepdim=True)
            torch.mul(dnormed.sub_(normed.mul_(along)), factor[part], out=dx[part])
        return dx.view(x.shape), None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate = gradients[0] * up
        # Over what it reads: one tensor of the MLP's width less where a layer's backward pass is at its peak.
        torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        return dgate, F.silu(gate).mul_(gradients[0])


def _parts(rows: Tensor) -> list[slice]:
    number = max(1, AT_ONCE // rows.shape[-1])
    return [slice(start, start + number) for start in range(0, len(rows), number)]


__all__ = ["AT_ONCE", "MLPS", "NORMS", "gated", "is_lean", "make_lean"]
