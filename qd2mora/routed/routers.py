"""From scores to gates, as pure functions of tensors.

A gate is `select` (which experts a token uses) times `weight` (how much each counts). Everything in float32, or float64
where the scores are. The number of operations does not depend on the number of experts.

Sources: top-k with renormalised softmax equals softmax over the chosen logits (Mixtral, MoLA, MeteoRA); top-p and
entropy by Tsallis of DynMoLE (mikecovlee/DynMoLE); noise by Shazeer et al. 2017 as in AMAP-ML/Omni-Effects, there also
at inference, here in training only; sampling without replacement (Plackett-Luce) through Gumbel noise.

Shapes: ... leading axes (rows, tokens), E experts.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .gate import Gate

# DynMoLE's, inside its entropy.
EPS = 1e-5


@dataclass(frozen=True)
class Gating:
    """What a router decided, all (..., E); `logits` are the raw scores.

    `chosen` is None where every expert is used; `order` (..., k) are the experts in the order they were drawn,
    `drawn_by` the scores that they were drawn by.
    """

    weight: Tensor
    probs: Tensor
    logits: Tensor
    chosen: Tensor | None = None
    order: Tensor | None = None
    drawn_by: Tensor | None = None

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
    kept: Tensor | None = None,
) -> Gating:
    """Return the gating of logits (..., E); `bias` (E,) enters the selection only, `noise` is added to what is sampled.

    For the score `activation` the logits are the rank units' activations u: selected by |u + bias|, weighed by
    softmax(|u| / (|u|_2 T)) where weights are asked for. For the weight `sigmoid_renorm` sigmoid(l) + bias is both what
    is selected by and what is weighed, as in SMoRA's code. `kept` (..., E): 0 where an expert is left out, else 1.
    A token in no span has logits of -inf at all experts, and the weight 0 for each.
    """
    if gate.input == "span":
        return _inside(gate, logits, bias, noise, kept)
    return _decided(gate, logits, bias, noise, kept)


def _inside(gate: Gate, logits: Tensor, bias: Tensor | None, noise: Tensor | None, kept: Tensor | None) -> Gating:
    """Return the gating of tokens in spans; of others everything is 0, exactly, the scores among it."""
    is_inside = (logits > -torch.inf).any(-1, keepdim=True)
    found = _decided(gate, torch.where(is_inside, logits, torch.zeros_like(logits)), bias, noise, kept)
    inside = is_inside.to(found.weight.dtype)
    return Gating(found.weight * inside, found.probs * inside, found.logits, found.used * inside, found.order)


def _decided(gate: Gate, logits: Tensor, bias: Tensor | None, noise: Tensor | None, kept: Tensor | None) -> Gating:
    if kept is not None:
        return _among(gate, logits, kept, bias, noise)
    # The bias steers who is chosen, and so the load, without changing what the chosen ones weigh.
    rank = logits
    if bias is not None:
        rank = logits + bias
    if gate.score == "activation":
        # Divided by the norm, so that a token's size does not decide how sharp its gates are.
        norm = logits.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)
        probs, rank = soft(logits.abs() / norm, gate.temperature), rank.abs()
    elif gate.weight == "sigmoid_renorm":
        rank = logits.sigmoid() if bias is None else logits.sigmoid() + bias
        probs = rank / rank.sum(-1, keepdim=True)
    else:
        probs = soft(logits, gate.temperature)
    if gate.select == "sample" and noise is not None:
        assert gate.top_k is not None
        # The k largest of logits + Gumbel noise are k draws without replacement, in the order drawn (Kool et al. 2019).
        order = (rank / gate.temperature + noise).detach().topk(gate.top_k, -1).indices
        drawn = torch.zeros_like(probs).scatter_(-1, order, 1.0)
        return Gating(_weigh(gate, logits, probs, drawn), probs, logits, drawn, order, rank)
    # Outside training a sampled gate takes its k likeliest: answers do not change from one asking to the next.
    chosen = _select(gate, probs, rank)
    return Gating(_weigh(gate, logits, probs, chosen), probs, logits, chosen)


def _among(gate: Gate, logits: Tensor, kept: Tensor, bias: Tensor | None, noise: Tensor | None) -> Gating:
    """Return the gating among the experts that are kept; a token that would keep none keeps all."""
    kept = torch.where(kept.sum(-1, keepdim=True) > 0, kept, torch.ones_like(kept))
    found = _decided(gate, logits.masked_fill(kept == 0, -torch.inf), bias, noise, None)
    # Penalties read the scores themselves, which are finite.
    logits = logits.expand(found.probs.shape)
    drawn_by = logits if bias is None else logits + bias
    return Gating(found.weight * kept, found.probs, logits, found.used * kept, found.order, drawn_by)


def noisy(scores: Tensor, spread: Tensor, noise: Tensor) -> Tensor:
    """Return W_g h + noise * softplus(W_n h), (..., E), of both products (Shazeer et al. 2017)."""
    return scores + noise * torch.nn.functional.softplus(spread)


def doubted(scores: Tensor, hidden: Tensor, out_EH: Tensor, draws: int) -> Tensor:
    """Return scores (..., E) over sqrt(1 + their variance over draws of the router) (MoFME's uncertainty-aware router).

    scores = hidden (..., H) out^T. Draw s leaves out every hidden unit whose number is s modulo `draws` and scales the
    others up, so that each unit is left out once and the draws' mean is the scores themselves. A reconstruction: the
    paper whitens draws of a router with dropout by their covariance, and its code has no dropout to draw with; here the
    draws are the same at every asking, and each expert has a variance of its own.
    """
    spread = torch.zeros_like(scores)
    for draw in range(draws):
        part = hidden[..., draw::draws] @ out_EH[:, draw::draws].T
        # l_s - mean = (sum - draws * part) / (draws - 1), where l_s is (sum - part) draws / (draws - 1).
        spread = spread + ((scores - draws * part) / (draws - 1)).square()
    return scores / (1 + spread / draws).sqrt()


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """Return 1 at the k largest of each token, of equal ones the first, else 0, in their dtype; no gradient."""
    # Not `topk`, which takes any of equal scores, another one on another device: the kernels take the first.
    best = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(scores).scatter_(-1, best, 1.0)


def tsallis_entropy(probs: Tensor, order: float) -> Tensor:
    """Return the entropy of each token in [0, 1]: 1 for equal gates, 0 for a single one; order 1 is Shannon's."""
    num_experts = probs.shape[-1]
    if num_experts == 1:
        return torch.zeros_like(probs[..., 0])  # the largest entropy is 0 as well: no 0 / 0
    if order == 1:
        return -(probs * (probs + EPS).log()).sum(-1) / math.log(num_experts)
    # Tsallis: S_q = (1 - sum p^q) / (q - 1), over its value at equal gates; eps within the power, as in DynMoLE's code.
    value = (1 - ((probs + EPS) ** order).sum(-1)) / (order - 1)
    return value / ((1 - num_experts ** (1 - order)) / (order - 1))


def log_probability(gating: Gating, temperature: float = 1.0) -> Tensor:
    """Return log P of the experts drawn, (...), one after the other without replacement (Plackett-Luce).

    log P = sum_i (l_i - log sum of exp l over those not drawn before i). A reconstruction: ReMix does not state its
    log-probability.
    """
    assert gating.order is not None and gating.chosen is not None and gating.drawn_by is not None
    logits = gating.drawn_by / temperature
    picked = logits.gather(-1, gating.order)
    # What is left before draw i: those never drawn, and those drawn from i on (a running logsumexp from the end).
    others = torch.where(gating.chosen > 0, torch.full_like(logits, -torch.inf), logits)
    later = picked.flip(-1).logcumsumexp(-1).flip(-1)
    left = torch.logaddexp(later, others.logsumexp(-1, keepdim=True))
    return (picked - left).sum(-1)


def _select(gate: Gate, probs: Tensor, rank: Tensor) -> Tensor | None:
    num_experts = probs.shape[-1]
    match gate.select:
        case "all":
            return None
        case "top_k" | "sample":
            assert gate.top_k is not None
            return None if gate.top_k >= num_experts else top_k_mask(rank, gate.top_k)
        case "fixed":
            return probs.detach()  # one-hot already: the logits are -inf at all experts but the row's own
        case "entropy":
            # DynMoLE: a few of the likeliest where the router is sure, all experts where it is not.
            chosen = _likeliest(probs, gate.top_p, gate.top_k or 1)
            unsure = tsallis_entropy(probs.detach(), gate.entropy_order) > gate.entropy_limit
            return torch.where(unsure.unsqueeze(-1), torch.ones_like(chosen), chosen)


def _likeliest(probs: Tensor, limit: float, least: int) -> Tensor:
    """Return 1 at the likeliest experts whose summed probability stays within the limit, at `least` so many, else 0."""
    if limit >= 1:  # a sum of rounded probabilities may pass 1
        return torch.ones_like(probs)
    ordered, places = probs.detach().sort(-1, descending=True)
    # DynMoLE's rule leaves out the expert that crosses the limit; MoE-PEFT's dynamic router keeps it.
    keep = ordered.cumsum(-1) <= limit
    keep[..., :least] = True
    return torch.zeros_like(probs).scatter_(-1, places, keep.to(probs.dtype))


def _weigh(gate: Gate, logits: Tensor, probs: Tensor, chosen: Tensor | None) -> Tensor:
    if gate.weight == "bounded":
        return 1 + 0.2 * logits.tanh()  # within 0.8 and 1.2 (ScaleZero)
    if gate.weight == "dense" or (chosen is None and gate.weight in ("softmax", "renorm", "soft")):
        return probs  # they sum to one already
    if chosen is None:
        chosen = torch.ones_like(probs)
    match gate.weight:
        case "softmax":
            return probs * chosen
        case "renorm" | "soft":
            masked = probs * chosen
            total = masked.sum(-1, keepdim=True)
            # Chosen probabilities may all underflow to 0, which must not bring 0 / 0 into the backward pass.
            return masked / torch.where(total > 0, total, torch.ones_like(total))
        case "straight_through":
            # In value omega where used, else 0; in the backward pass the softmax, at experts not used as well.
            return gate.omega * chosen + probs - probs.detach()
        case "sigmoid":
            return logits.sigmoid() * chosen
        case "sigmoid_renorm":
            masked = probs * chosen
            # k times, so that ranks that all count alike count one each.
            return chosen.detach().sum(-1, keepdim=True) * masked / masked.sum(-1, keepdim=True)
    return _alike(gate, chosen)


def _alike(gate: Gate, chosen: Tensor) -> Tensor:
    """Return what those chosen count where they all count the same: omega, equal parts of one, or one."""
    if gate.weight == "equal":
        return chosen / chosen.sum(-1, keepdim=True)
    return gate.omega * chosen if gate.weight == "uniform" else chosen


def soft(scores: Tensor, temperature: float) -> Tensor:
    """Return the softmax of scores over the temperature, (..., E)."""
    return (scores if temperature == 1 else scores / temperature).softmax(-1)


__all__ = ["Gating", "decide", "doubted", "log_probability", "noisy", "soft", "tsallis_entropy"]
