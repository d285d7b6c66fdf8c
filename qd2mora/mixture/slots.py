"""The experts that tokens chose, as a leading axis: what a mixture of whole MLPs computes, as functions of tensors.

See `mlp_layer` for where slots come from and what reads them. Autograd functions here keep in a forward pass only what
their backward pass cannot make again: masks are drawn anew, penalties are taken where the gradient passes.

Shapes: K slots, ... leading axes (rows, tokens), E experts, D d_in, Q ranks of a bank with the shared expert's, F width
of what is averaged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qd2mora.mixture.draws import Draws
from qd2mora.mixture.rank_space import Observe
from qd2mora.routed import ops
from qd2mora.routed.gate import Gate
from qd2mora.routed.ops import RankStep
from qd2mora.routed.routers import Gating, decide


@dataclass(frozen=True)
class Slots:
    """The experts that tokens chose: `weight` (K, ...), `which` (K, ..., E) of 0 and 1; at least float32.

    `is_mean`: whether the weights sum to one, so that equal experts come out as they went in, to the bit.
    """

    weight: Tensor
    which: Tensor
    is_mean: bool

    def ranks(self, step: RankStep) -> Tensor:
        """Return m (K, ..., Q): 1 at the ranks of the slot's expert, 0 at others'; a shared expert's own scale."""
        chosen = ops.repeated(self.which, step.ranks_down)
        # A shared expert takes part in every slot.
        if not step.shared:
            return chosen
        shared = chosen.new_full((*chosen.shape[:-1], step.shared), step.shared_scaling)
        return torch.cat([chosen, shared], -1)

    def mean(self, h: Tensor) -> Tensor:
        """Return sum_k g_k h_k, (..., F), of h (K, ..., F)."""
        mean: Tensor = _WeightedSlots.apply(h, self.weight, self.is_mean)
        return mean

    def mixed(self, step: RankStep, u: Tensor) -> Tensor:
        """Return sum_k g_k m_k u_k, (..., Q), of u (K, ..., Q)."""
        return (self.weight.unsqueeze(-1) * self.ranks(step) * u).sum(0)


@dataclass(frozen=True)
class MLPGate:
    """One MLP's gate, from logits to slots."""

    gate: Gate
    select_bias: Tensor | None

    def gating(self, logits: Tensor) -> Gating:
        """Return what the router decides."""
        with ops.unlowered(logits):
            return decide(self.gate, logits, bias=self.select_bias)

    def slots(self, logits: Tensor, tokens: torch.Size) -> Slots:
        """Return the slots of logits that broadcast to (*tokens, E)."""
        gating = self.gating(logits)
        num_experts = logits.shape[-1]
        # Chosen experts before others, likelier ones first: `used` is 0 or 1, probabilities stay within 1.
        order = (2 * gating.used + gating.probs).detach()
        places = order.topk(num_slots(self.gate, num_experts), -1).indices
        which = torch.zeros(*places.shape, num_experts, dtype=order.dtype, device=order.device)
        which.scatter_(-1, places.unsqueeze(-1), 1.0)
        # Gathered, not computed anew: the router's gradient is that of its own gating, renormalised or not.
        weight = gating.weight.gather(-1, places).expand(*tokens, -1).movedim(-1, 0)
        return Slots(weight, which.expand(*tokens, -1, -1).movedim(-2, 0), self._is_mean)

    @property
    def _is_mean(self) -> bool:
        match self.gate.weight:
            case "renorm" | "dense" | "soft" | "equal":
                return True
            case "straight_through":  # omega on each of the k chosen
                return self.gate.omega * (self.gate.top_k or 1) == 1
            case "softmax":
                return self.gate.select in ("all", "fixed")
        return False


def num_slots(gate: Gate, num_experts: int) -> int:
    """Return the experts that can get a weight, or its gradient: some weights reach those not chosen too."""
    if gate.weight in ("straight_through", "bounded", "dense", "soft"):
        return num_experts
    limits = {"top_k": gate.top_k or num_experts, "fixed": 1}
    return min(limits.get(gate.select, num_experts), num_experts)


class _WeightedSlots(torch.autograd.Function):
    """sum_k g_k h_k (..., F) of h (K, ..., F); where the weights sum to one, h_0 + sum_{k>0} g_k (h_k - h_0).

    Accumulates in float32, or float64 where h is. The second form is exact where all h_k are equal, whatever rounding
    made of the weights; it gives g_0 no gradient of its own, which the others' have in them.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, is_mean: bool) -> Tensor:
        ctx.save_for_backward(h, weight)
        ctx.is_mean = is_mean
        # While B is zero all h_k are equal: weights that sum to 1 but for their last bit would move the model off its
        # base.
        first, rest = ops.wide(h[0]), zip(h[1:], weight[1:].unsqueeze(-1), strict=True)
        if is_mean:
            mean = first.clone()
            for slot, g in rest:
                mean.addcmul_(slot - first, g.to(mean.dtype))
        else:
            mean = first * weight[0].unsqueeze(-1)
            for slot, g in rest:
                mean.addcmul_(ops.wide(slot), g.to(mean.dtype))
        return mean.to(h.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, weight = ctx.saved_tensors
        dh, dweight = torch.empty_like(h), torch.zeros_like(weight)
        # Slot by slot: a product over all of them would be K times the width of the MLP in float32.
        wide_dy = ops.wide(dy)
        first: Tensor | float = 0.0
        if ctx.is_mean:
            first = ops.wide(h[0])
        for number, slot in enumerate(h):
            if ctx.is_mean and number == 0:
                # From h_0 + sum_{k>0} g_k (h_k - h_0): the first slot has what the others leave.
                dh[0] = wide_dy * (1 - weight[1:].sum(0)).unsqueeze(-1)
                continue
            dh[number] = wide_dy * weight[number].unsqueeze(-1)
            dweight[number] = (wide_dy * (slot - first)).sum(-1)
        return dh, dweight, None


@dataclass(frozen=True)
class SlotDropout:
    """Dropout of what an MLP's linear reads: one mask for all slots, or one for each of `masks` slots."""

    probability: float
    masks: int
    draws: Draws

    def apply(self, x: Tensor, dims: int) -> Tensor:
        """Return x dropped, (..., D) or (K, ..., D); `dims` are those of x with slots."""
        dropped: Tensor = _Dropped.apply(x, dims, self)
        return dropped

    def mask(self, like: Tensor) -> Tensor:
        """Return the mask, (..., D) like `like`, or (K, ..., D)."""
        if self.masks == 1:
            return self.draws.keep(like, self.probability, 0)
        # A purpose for each mask: the numbers of two slots have nothing in common.
        return torch.stack([self.draws.keep(like, self.probability, number) for number in range(self.masks)])


class _Dropped(torch.autograd.Function):
    """x times its mask, each mask drawn again in the backward pass instead of kept.

    Several masks give x slots where it has none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: int, dropout: SlotDropout) -> Tensor:
        ctx.dropout, ctx.shape, ctx.has_slots = dropout, x.shape, x.dim() > dims
        return x * dropout.mask(x[0] if ctx.has_slots else x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # x without slots, several masks: dy has an axis that x lacks, and sums over it.
        like = dy[0] if dy.dim() > len(ctx.shape) or ctx.has_slots else dy
        return (dy * ctx.dropout.mask(like)).sum_to_size(ctx.shape), None, None


class Observed(torch.autograd.Function):
    """y itself. Its backward pass adds the penalties' gradient to the logits', once a micro batch.

    So it runs wherever y has a gradient, even where the gates pass none on, and never in a recomputed forward pass.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, logits: Tensor, gating: Callable[[Tensor], Gating], observe: Observe) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.gating, ctx.observe = gating, observe
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        leaf = logits.detach().requires_grad_()
        with torch.enable_grad():
            extra = ctx.observe({"down": ctx.gating(leaf)})
        # Counts and values are taken by now, even where no gradient goes on to the logits.
        if extra is None or not ctx.needs_input_grad[1]:
            return dy, None, None, None
        return dy, torch.autograd.grad(extra, leaf)[0], None, None


__all__ = ["MLPGate", "Observed", "SlotDropout", "Slots", "num_slots"]
