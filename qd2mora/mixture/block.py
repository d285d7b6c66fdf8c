"""Experts that are whole MLPs, mixed after the nonlinearity, at the price of one pass through the frozen weights.

y = sum over chosen e of g_e W2_e (act(W1_e x) * W3_e x), W_e = W + s B_e A_e (MixLoRA, arXiv 2404.15159; github
TUDB-Labs/MixLoRA). A token's k chosen experts are its slots, a leading axis K that the MLP's own forward carries along:

- gate_proj and up_proj run their base once, and for all slots a mask in rank space and one product: W x + s B m_k A x;
- the MLP applies its own nonlinearity to (K, ..., d_ff), k of them, never one for each expert;
- down_proj takes the weighted sum over slots first, because W2 is linear: sum_k g_k W2 h_k = W2 (sum_k g_k h_k). So
  the base runs once and on T tokens, not on k T; the low-rank terms sum_k g_k B m_k A h_k are summed in rank space too.

Nothing is installed on the MLP. Its router belongs to the first of its adapted linears, which says what the slots are.
Where that is down_proj itself there is nothing to carry along, and where a bank has one expert nothing to choose: both
are the plain layer, exactly. Rank space and the mean over slots accumulate in float32, or float64 where x is.

Saved for the backward pass in an MLP, an entry of the intermediate width a token: 4 k in the dtype of x (what the
activation, the product, its second factor and down_proj read) beside 4 for one LoRA, or 3 k beside 3 where a run keeps
no activated gate (memory.lean); a dropped input once more where there is dropout, masks never. In rank space, a rank of
a bank a token, in all three linears together: 24 k + 2 bytes in 16 bits, 28 k + 4 in float32 (measured).

Deviations: one dropout mask a linear by default, one for each slot with `dropout_per_expert`, where each published
expert draws its own; every router is balanced by itself (see `balance`).

Shapes: K slots, ... leading axes (rows, tokens), E experts, D d_in, O d_out, Q ranks of a bank with the shared
expert's, F width between the linears.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qd2mora.errors import InputRefused
from qd2mora.mixture import ops
from qd2mora.mixture.draws import Draws
from qd2mora.mixture.gating import given_logits
from qd2mora.mixture.method import MLP, Gate
from qd2mora.mixture.observer import Observer
from qd2mora.mixture.routers import Gating, decide
from qd2mora.mixture.spec import LinearSpec, Place

if TYPE_CHECKING:
    from qd2mora.mixture.config import MixtureConfig
    from qd2mora.mixture.layer import MixtureLinear

LAST = "down_proj"


@dataclass(frozen=True)
class Slots:
    """The experts that tokens chose: `weight` (K, ...), `which` (K, ..., E) of 0 and 1; at least float32.

    `is_mean`: whether the weights sum to one, so that equal experts come out as they went in, to the bit.
    """

    weight: Tensor
    which: Tensor
    is_mean: bool

    def ranks(self, spec: LinearSpec) -> Tensor:
        """Return (K, ..., Q): 1 at the ranks of the slot's expert, 0 at others'; a shared expert's own scale."""
        sizes = spec.step.ranks_down
        if len(set(sizes)) == 1:
            chosen = self.which.repeat_interleave(sizes[0], -1)
        else:
            repeats = torch.tensor(sizes, device=self.which.device)
            chosen = self.which.repeat_interleave(repeats, -1, output_size=sum(sizes))
        shared = chosen.new_full((*chosen.shape[:-1], spec.step.shared), spec.step.shared_scaling)
        return torch.cat([chosen, shared], -1) if spec.step.shared else chosen


def mixes_blocks(config: "MixtureConfig", spec: LinearSpec) -> bool:
    """Tell whether this linear is part of a mixture of whole MLPs."""
    is_part = config.row.placement == "mlp" and spec.place.kind in MLP and spec.gate("down") is not None
    return is_part and not (spec.place.kind == LAST and spec.place.owns_router)


def refuse_unfit(config: "MixtureConfig", key: str) -> None:
    """Raise InputRefused where a mixture of whole MLPs cannot take this linear, or its router serves no single MLP."""
    row, kind = config.row, key.rpartition(".")[2]
    if row.placement != "mlp":
        return
    if kind not in (*MLP, *row.one_expert):
        raise InputRefused(f"adapter.targets: {key}: {row.name} mixes whole MLPs; name {', '.join(MLP)}")
    for role, gate in config.gates_of_row.items():
        if gate.scope != "block":
            raise InputRefused(
                f"adapter.gates.{role}.scope: '{gate.scope}' will not do: an MLP of {row.name} has one router, 'block'"
            )


def refuse_open_blocks(layers: Iterable["MixtureLinear"], adapter: str) -> None:
    """Raise InputRefused where slots would leave an MLP unmixed, because its last linear has no adapter."""
    parts = [layer.mixture_spec[adapter].place for layer in layers if has_slots(layer, adapter)]
    closed = {_block(place) for place in parts if place.kind == LAST}
    for place in parts:
        if _block(place) not in closed:
            raise InputRefused(f"adapter.targets: {place.key} is mixed after {LAST}; name that too")


def has_slots(layer: "MixtureLinear", adapter: str) -> bool:
    """Tell whether the linear carries this adapter as part of a mixture of whole MLPs."""
    return adapter in layer.mixture_spec and mixes_blocks(layer.mixture_config[adapter], layer.mixture_spec[adapter])


def routed_adapter(layer: "MixtureLinear") -> str | None:
    """Return the active adapter that mixes whole MLPs here, None where there is none or a static one stands in for it.

    Raises ValueError where another adapter is active beside it: what the two should mean together is not defined.
    """
    names = [name for name in layer.active_adapters if name in layer.mixture_spec]
    found = [name for name in names if name not in layer.static_updates and has_slots(layer, name)]
    if found and len(names) > 1:
        others = ", ".join(name for name in names if name != found[0])
        raise ValueError(f"adapter '{found[0]}' mixes whole MLPs and runs alone on them; deactivate {others}")
    return found[0] if found else None


def forward(layer: "MixtureLinear", x: Tensor, name: str) -> Tensor:
    """Return (K, ..., O) of x (..., D) in an MLP's first linears, (..., O) of (K, ..., D) in its last."""
    spec = layer.mixture_spec[name]
    if spec.place.kind == LAST:
        return _close(layer, x, name)
    observer = None
    key = (name, _block(spec.place))
    if spec.place.owns_router:
        tensors = layer.tensors(name)
        gate = spec.gate("down")
        assert gate is not None
        logits = given_logits("down", x, tensors, layer.routing, name, spec)
        assert logits is not None
        choose = _Choice(gate, tensors.get("mixture_select_bias_down"))
        layer.routing.slots[key] = choose.slots(logits, x.shape[:-1])
        observer = Observer.of(spec, layer.routing, name, x) if layer.training else None
    y = layer.base_layer(x)
    slots = _slots(layer, name)
    u = _rank_features(layer, x, name, y.dtype, slots)
    stacked = ops.up_product(slots.ranks(spec) * u, layer.columns(name), spec.scaling, y.dtype) + y
    return stacked if observer is None else _Observed.apply(stacked, logits, choose, observer)


def mean_input(layer: "MixtureLinear", x: Tensor, name: str) -> Tensor:
    """Return what the base of this linear reads of x: the mean over slots in an MLP's last linear, x elsewhere."""
    return _mean(x, _slots(layer, name)) if _is_last(layer, name) else x


def closing_rank_space(layer: "MixtureLinear", h: Tensor, name: str) -> tuple[Tensor, Tensor] | None:
    """Return u = A hbar of the mean over slots, (..., Q), and v = sum_k g_k m_k A h_k, (..., Q), float32.

    None where the linear closes no mixture. A static K that explains v by u is the best stand-in for an MLP whose
    slots are one.
    """
    if not _is_last(layer, name):
        return None
    slots, rows = _slots(layer, name), [layer.rows(name)]
    mean = ops.wide(ops.features(_mean(h, slots), rows))
    return mean, _mixed(slots, layer.mixture_spec[name], ops.wide(ops.features(h, rows)))


def _is_last(layer: "MixtureLinear", name: str) -> bool:
    place = layer.mixture_spec[name].place
    return place.kind == LAST and has_slots(layer, name) and (name, _block(place)) in layer.routing.slots


def _block(place: Place) -> str:
    return place.scope_key("block")


def _slots(layer: "MixtureLinear", name: str) -> Slots:
    place = layer.mixture_spec[name].place
    slots = layer.routing.slots.get((name, _block(place)))
    if slots is None:
        raise ValueError(f"{place.key} is part of a mixture of whole MLPs and runs inside its MLP only, unmerged")
    return slots


def _close(layer: "MixtureLinear", h: Tensor, name: str) -> Tensor:
    spec, slots = layer.mixture_spec[name], _slots(layer, name)
    y = layer.base_layer(_mean(h, slots))
    linear: Any = layer.get_base_layer()
    if linear.bias is not None and not slots.is_mean:
        y = y + ((slots.weight.sum(0) - 1).unsqueeze(-1) * linear.bias).to(y.dtype)
    v = _mixed(slots, spec, _rank_features(layer, h, name, y.dtype, slots))
    # The slots are done with: what keeps the graph of this pass alive ends here.
    del layer.routing.slots[(name, _block(spec.place))]
    return y + ops.up_product(v, layer.columns(name), spec.scaling, y.dtype)


def _mixed(slots: Slots, spec: LinearSpec, u: Tensor) -> Tensor:
    """Return sum_k g_k m_k u_k, (..., Q)."""
    return (slots.weight.unsqueeze(-1) * slots.ranks(spec) * u).sum(0)


def _mean(h: Tensor, slots: Slots) -> Tensor:
    mean: Tensor = _WeightedSlots.apply(h, slots.weight, slots.is_mean)
    return mean


def _rank_features(layer: "MixtureLinear", x: Tensor, name: str, dtype: torch.dtype, slots: Slots) -> Tensor:
    """Return A x of every rank, (..., Q) or (K, ..., Q), at least float32; x dropped in training."""
    config, x = layer.mixture_config[name], x.to(dtype)
    if layer.training and config.dropout > 0:
        masks = len(slots.weight) if config.dropout_per_expert else 1
        x = _Dropped.apply(x, slots.weight.dim(), config.dropout, masks, layer.routing.draws(layer.layer_key))
    return ops.wide(ops.features(x, [layer.rows(name)]))


@dataclass(frozen=True)
class _Choice:
    """One MLP's gate, from logits to slots."""

    gate: Gate
    select_bias: Tensor | None

    def gating(self, logits: Tensor) -> Gating:
        with ops.unlowered(logits):
            return decide(self.gate, logits, bias=self.select_bias)

    def slots(self, logits: Tensor, tokens: torch.Size) -> Slots:
        """Return the slots of logits that broadcast to (*tokens, E)."""
        gating = self.gating(logits)
        num_experts = logits.shape[-1]
        # Chosen experts before others, likelier ones first.
        order = (2 * gating.used + gating.probs).detach()
        places = order.topk(num_slots(self.gate, num_experts), -1).indices
        which = torch.zeros(*places.shape, num_experts, dtype=order.dtype, device=order.device)
        which.scatter_(-1, places.unsqueeze(-1), 1.0)
        weight = gating.weight.gather(-1, places).expand(*tokens, -1).movedim(-1, 0)
        return Slots(weight, which.expand(*tokens, -1, -1).movedim(-2, 0), self._is_mean)

    @property
    def _is_mean(self) -> bool:
        sums_to_one = self.gate.weight == "renorm"
        sums_to_one |= self.gate.weight == "straight_through" and self.gate.omega * (self.gate.top_k or 1) == 1
        sums_to_one |= self.gate.weight == "softmax" and self.gate.select in ("all", "fixed")
        return sums_to_one and self.gate.select != "switch"


def num_slots(gate: Gate, num_experts: int) -> int:
    """Return the experts that can get a weight, or its gradient: straight_through's reaches those not chosen too."""
    if gate.weight in ("straight_through", "bounded"):
        return num_experts
    limits = {"top_k": gate.top_k or num_experts, "switch": 1, "fixed": 1}
    return min(limits.get(gate.select, num_experts), num_experts)


class _WeightedSlots(torch.autograd.Function):
    """sum_k g_k h_k (..., F) of h (K, ..., F); where the weights sum to one, h_0 + sum_{k>0} g_k (h_k - h_0)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, is_mean: bool) -> Tensor:
        ctx.save_for_backward(h, weight)
        ctx.is_mean = is_mean
        first = ops.wide(h[0])
        mean = first.clone() if is_mean else first * weight[0].unsqueeze(-1)
        for slot, g in zip(h[1:], weight[1:].unsqueeze(-1), strict=True):
            mean.addcmul_(slot - first if is_mean else ops.wide(slot), g.to(mean.dtype))
        return mean.to(h.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, weight = ctx.saved_tensors
        dh, dweight = torch.empty_like(h), torch.zeros_like(weight)
        wide_dy, first = ops.wide(dy), ops.wide(h[0]) if ctx.is_mean else 0.0
        for number, slot in enumerate(h):
            if ctx.is_mean and number == 0:
                dh[0] = wide_dy * (1 - weight[1:].sum(0)).unsqueeze(-1)
                continue
            dh[number] = wide_dy * weight[number].unsqueeze(-1)
            dweight[number] = (wide_dy * (slot - first)).sum(-1)
        return dh, dweight, None


class _Dropped(torch.autograd.Function):
    """x times its mask, (..., D) or (K, ..., D), each mask drawn again in the backward pass instead of kept.

    `dims` are those of x with slots; several masks give x slots where it has none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: int, probability: float, masks: int, draws: Draws) -> Tensor:
        ctx.keep = lambda like: _keep(like, probability, masks, draws)
        ctx.shape, ctx.has_slots = x.shape, x.dim() > dims
        return x * ctx.keep(x[0] if ctx.has_slots else x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        like = dy[0] if dy.dim() > len(ctx.shape) or ctx.has_slots else dy
        return (dy * ctx.keep(like)).sum_to_size(ctx.shape), None, None, None, None


def _keep(like: Tensor, probability: float, masks: int, draws: Draws) -> Tensor:
    if masks == 1:
        return draws.keep(like, probability, 0)
    return torch.stack([draws.keep(like, probability, number) for number in range(masks)])


class _Observed(torch.autograd.Function):
    """y itself. Its backward pass adds the penalties' gradient to the logits', once a micro batch.

    So it runs wherever y has a gradient, even where the gates pass none on, and never in a recomputed forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, logits: Tensor, choose: _Choice, observe: Callable[[Mapping[str, Gating]], Tensor | None]
    ) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.choose, ctx.observe = choose, observe
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        leaf = logits.detach().requires_grad_()
        with torch.enable_grad():
            extra = ctx.observe({"down": ctx.choose.gating(leaf)})
        wanted = extra is not None and ctx.needs_input_grad[1]
        return dy, torch.autograd.grad(extra, leaf)[0] if wanted else None, None, None


__all__ = [
    "Slots",
    "closing_rank_space",
    "forward",
    "has_slots",
    "mean_input",
    "mixes_blocks",
    "num_slots",
    "refuse_open_blocks",
    "refuse_unfit",
    "routed_adapter",
]
