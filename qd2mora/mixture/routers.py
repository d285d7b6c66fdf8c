"""From scores to gates, as pure functions of tensors.

A gate is `select` (which experts a token uses) times `weight` (how much each counts). Everything in float32, or float64
where the scores are. The number of operations does not depend on the number of experts.

Sources: top-k with renormalised softmax equals softmax over the chosen logits (Mixtral, MoLA, MeteoRA); the two top-p
rules of MoE-PEFT and DynMoLE; entropy by Tsallis of DynMoLE (mikecovlee/DynMoLE); noise by Shazeer et al. 2017 as in
AMAP-ML/Omni-Effects, there also at inference, here in training only; switch capacity of MoE-PEFT, here in training only
(a cache that decodes token by token knows no running count); sampling without replacement (Plackett-Luce) through
Gumbel noise.

Shapes: ... leading axes (rows, tokens), E experts.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qd2mora.mixture.method import Gate

EPS = 1e-5


@dataclass(frozen=True)
class Gating:
    """What a router decided, all (..., E); `logits` are the raw scores.

    `chosen` is None where every expert is used; `order` (..., k) are the experts in the order they were drawn.
    """

    weight: Tensor
    probs: Tensor
    logits: Tensor
    chosen: Tensor | None = None
    order: Tensor | None = None

    @property
    def used(self) -> Tensor:
        """1 where an expert is used, else 0."""
        return torch.ones_like(self.probs) if self.chosen is None else self.chosen


def decide(
    gate: Gate,
    logits: Tensor,
    *,
    bias: Tensor | None = None,
    noise: Tensor | None = None,
    counted: Tensor | None = None,
) -> Gating:
    """Return the gating of logits (..., E); `bias` (E,) enters the selection only, `noise` is added to what is sampled.

    `counted` (...) of 0 and 1 are the tokens that fill an expert's capacity; without it no expert is ever full.

    For the score `activation` the logits are the rank units' activations u: selected by |u + bias|, weighed by
    softmax(|u| / (|u|_2 T)) where weights are asked for.
    """
    if gate.score == "activation":
        norm = logits.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)
        probs = _soft(logits.abs() / norm, gate.temperature)
        rank = (logits if bias is None else logits + bias).abs()
    else:
        probs = _soft(logits, gate.temperature)
        rank = logits if bias is None else logits + bias
    if gate.select == "sample" and noise is not None:
        assert gate.top_k is not None
        order = (rank / gate.temperature + noise).detach().topk(gate.top_k, -1).indices
        drawn = torch.zeros_like(probs).scatter_(-1, order, 1.0)
        return Gating(_weigh(gate, logits, probs, drawn), probs, logits, drawn, order)
    chosen = _select(gate, probs, rank, counted)
    return Gating(_weigh(gate, logits, probs, chosen), probs, logits, chosen)


def noisy(scores: Tensor, noise: Tensor | None) -> Tensor:
    """Return W_g h + noise * softplus(W_n h); `scores` (..., 2E) hold both products."""
    clean, spread = scores.chunk(2, -1)
    return clean if noise is None else clean + noise * torch.nn.functional.softplus(spread)


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """Return 1 at the k largest of each token, else 0, in the dtype of `scores`; no gradient."""
    return torch.zeros_like(scores).scatter_(-1, scores.detach().topk(k, -1).indices, 1.0)


def tsallis_entropy(probs: Tensor, order: float) -> Tensor:
    """Return the entropy of each token in [0, 1]: 1 for equal gates, 0 for a single one; order 1 is Shannon's."""
    num_experts = probs.shape[-1]
    if num_experts == 1:
        return torch.zeros_like(probs[..., 0])
    if order == 1:
        return -(probs * (probs + EPS).log()).sum(-1) / math.log(num_experts)
    value = (1 - ((probs + EPS) ** order).sum(-1)) / (order - 1)
    return value / ((1 - num_experts ** (1 - order)) / (order - 1))


def log_probability(gating: Gating, temperature: float = 1.0) -> Tensor:
    """Return log P of the experts drawn, (...), one after the other without replacement (Plackett-Luce).

    A reconstruction: ReMix does not state its log-probability.
    """
    assert gating.order is not None and gating.chosen is not None
    logits = gating.logits / temperature
    picked = logits.gather(-1, gating.order)
    others = torch.where(gating.chosen > 0, torch.full_like(logits, -torch.inf), logits)
    later = picked.flip(-1).logcumsumexp(-1).flip(-1)
    left = torch.logaddexp(later, others.logsumexp(-1, keepdim=True))
    return (picked - left).sum(-1)


def _select(gate: Gate, probs: Tensor, rank: Tensor, counted: Tensor | None) -> Tensor | None:
    num_experts = probs.shape[-1]
    match gate.select:
        case "all":
            return None
        case "top_k" | "sample":
            assert gate.top_k is not None
            return None if gate.top_k >= num_experts else top_k_mask(rank, gate.top_k)
        case "fixed":
            return probs.detach()
        case "top_p":
            return _top_p(probs, gate.top_p, 1, inclusive=True)
        case "entropy":
            chosen = _top_p(probs, gate.top_p, gate.top_k or 1, inclusive=False)
            unsure = tsallis_entropy(probs.detach(), gate.entropy_order) > gate.entropy_limit
            return torch.where(unsure.unsqueeze(-1), torch.ones_like(chosen), chosen)
        case "switch":
            return _within_capacity(top_k_mask(rank, 1), gate.capacity, counted)


def _top_p(probs: Tensor, limit: float, least: int, *, inclusive: bool) -> Tensor:
    """Keep the likeliest experts whose summed probability stays within the limit; `inclusive`: and the one crossing."""
    if limit >= 1:  # a sum of rounded probabilities may pass 1
        return torch.ones_like(probs)
    ordered, places = probs.detach().sort(-1, descending=True)
    summed = ordered.cumsum(-1)
    before = summed - ordered if inclusive else summed
    keep = (before < limit) if inclusive else (before <= limit)
    keep[..., :least] = True
    return torch.zeros_like(probs).scatter_(-1, places, keep.to(probs.dtype))


def _within_capacity(chosen: Tensor, capacity: int | None, counted: Tensor | None) -> Tensor:
    """Drop tokens of a row past `capacity` for one expert; the running count is along the token axis."""
    if capacity is None or counted is None:
        return chosen
    chosen = chosen * counted.to(chosen.dtype).unsqueeze(-1)
    return chosen * (chosen.cumsum(-2) <= capacity)


def _weigh(gate: Gate, logits: Tensor, probs: Tensor, chosen: Tensor | None) -> Tensor:
    match gate.weight:
        case "softmax":
            return probs if chosen is None else probs * chosen
        case "renorm" if chosen is None:
            return probs
        case "renorm":
            assert chosen is not None
            masked = probs * chosen
            total = masked.sum(-1, keepdim=True)
            # A token that a full expert turned away has no expert, and must not bring 0 / 0 into the backward pass.
            return masked / torch.where(total > 0, total, torch.ones_like(total))
        case "bounded":
            return 1 + 0.2 * logits.tanh()
    used = torch.ones_like(probs) if chosen is None else chosen
    match gate.weight:
        case "straight_through":
            return gate.omega * used + probs - probs.detach()
        case "sigmoid":
            return logits.sigmoid() * used
        case "uniform":
            return gate.omega * used
        case _:  # one
            return used


def _soft(scores: Tensor, temperature: float) -> Tensor:
    return (scores if temperature == 1 else scores / temperature).softmax(-1)


__all__ = ["Gating", "decide", "log_probability", "noisy", "top_k_mask", "tsallis_entropy"]
