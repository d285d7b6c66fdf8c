"""Penalties that read routing, as pure functions of what a router decided.

Each takes a `View` of one router over one micro batch and returns a value for each of its groups: one group of all
counted tokens (`over="batch"`), or one a row (`over="row"`). Padding never counts. They are evaluated in the backward
pass, where the step in rank space is done again anyway, so that checkpointing and accumulation leave them alone.

Where a penalty pools routers (`Penalty.pool`), its means are those of all of them: what they decided in the forward
pass (`Pooled`) stands for the others, so that each adds its own part of the value, and exactly its own gradient. So
pooled, a skewed layer can hide behind another, as in Mixtral's rule; MoLA pools the linears of a layer.

Deviations: padding never counts, where MoLA's and LoRAMoE's code, and DynMoLE's entropy, let it count; MeteoRA's code
leaves the last token of each row out, here it counts.

Shapes: G groups, n tokens of a group, E experts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from qd2mora.mixture.method import Penalty
from qd2mora.routed.routers import Gating, tsallis_entropy


@dataclass(frozen=True)
class View:
    """One router's decisions: probs, used, logits (G, n, E), counted (G, n) of 0 and 1; group, task (G, n) or None.

    task: the number of the row's task, or of what did better on the row, as the penalty needs it.

    mark: (G, n) the number of the span's adapter at each token, 0 in none; None where the pass tells no spans.

    is_of_rows: each entry stands for a whole row, not for a token.
    """

    probs: Tensor
    used: Tensor
    logits: Tensor
    counted: Tensor
    group: Tensor | None = None
    task: Tensor | None = None
    is_of_rows: bool = False
    mark: Tensor | None = None

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over counted tokens of (G, n, ...) as (G, ...)."""
        counted = self.counted
        if values.dim() == 3:
            counted = counted.unsqueeze(-1)
        # A row of padding alone has the mean 0, not 0 / 0.
        return (values * counted).sum(1) / counted.sum(1).clamp_min(1)


def view(
    gating: Gating,
    counted_BT: Tensor,
    by_row: bool,
    group: Tensor | None,
    task: Tensor | None,
    mark: Tensor | None = None,
) -> View:
    """Arrange a gating over rows and tokens; gates of a whole row count once a row.

    group, task: (B,). mark: (B, T).
    """
    num_rows = counted_BT.shape[0]
    # Gates of a whole row come as (B, 1, E), static ones as (E,).
    shape = torch.broadcast_shapes(gating.probs.shape, (num_rows, 1, gating.probs.shape[-1]))
    is_of_rows = shape[1] == 1 and counted_BT.shape[1] > 1
    counted = counted_BT
    if is_of_rows:
        counted = counted_BT.new_ones(num_rows, 1)

    def arranged(values: Tensor) -> Tensor:
        """Each row a group, or all rows' tokens one."""
        if by_row:
            return values
        return values.reshape(1, -1, *values.shape[2:])

    def of_tokens(ids: Tensor | None) -> Tensor | None:
        if ids is None:
            return None
        return arranged(ids.unsqueeze(-1).expand(shape[:2]))

    probs, used, logits = (arranged(each.expand(shape)) for each in (gating.probs, gating.used, gating.logits))
    counted = arranged(counted.to(probs.dtype))
    if mark is not None:
        mark = arranged(mark.to(probs.device))
    return View(probs, used, logits, counted, of_tokens(group), of_tokens(task), is_of_rows, mark)


@dataclass(frozen=True)
class Pooled:
    """Means over the tokens of several routers, without gradient: used, probs, their product, all (G, E).

    `tokens` (G,): those of each group, a row or the whole micro batch; `number`: of routers, which have as many experts
    and the same tokens.
    """

    used: Tensor
    probs: Tensor
    both: Tensor
    tokens: Tensor
    number: int = 1

    @classmethod
    def of(cls, gating: Gating, counted_BT: Tensor) -> "Pooled":
        """Return one router's own, row by row."""
        seen = view(gating, counted_BT, True, None, None)
        used, probs, both = (seen.mean(each).detach() for each in (seen.used, seen.probs, seen.probs * seen.used))
        return cls(used, probs, both, seen.counted.sum(1))

    @classmethod
    def joined(cls, parts: list["Pooled"], by_row: bool) -> "Pooled":
        """Return the means over several routers, of each row or of all rows' tokens."""
        tokens = parts[0].tokens
        # The mean over a batch's tokens, out of rows' means: each row by its tokens.
        weight = tokens / tokens.sum().clamp_min(1)

        def mean(values: list[Tensor]) -> Tensor:
            found = torch.stack(values).mean(0)
            return found if by_row else (weight @ found).unsqueeze(0)

        used, probs = mean([part.used for part in parts]), mean([part.probs for part in parts])
        return cls(used, probs, mean([part.both for part in parts]), tokens, len(parts))


def pooled_value(kind: str, routed: View, penalty: Penalty, pool: Pooled) -> Tensor:
    """Return one router's part of a penalty over a pool: parts add up to its value, and each has its own gradient."""
    num_experts = routed.probs.shape[-1]
    # One factor is the pool's, without a gradient, the other this router's own mean over their number: summed over
    # routers that is the product of both means.
    if kind == "lb_mixtral":
        return num_experts * (pool.used * routed.mean(routed.probs)).sum(-1) / pool.number
    if kind == "lb_llava":
        return (pool.used * routed.mean(routed.probs)).sum(-1) / pool.number
    if kind == "lb_mola":
        return (
            num_experts
            * (pool.used / pool.used.sum(-1, keepdim=True) * routed.mean(routed.probs)).sum(-1)
            / pool.number
        )
    if kind == "lb_soft":
        # Both factors have a gradient; the second term brings the other one's, and no value.
        of_probs = (pool.both * routed.mean(routed.probs)).sum(-1)
        of_both = (routed.mean(routed.probs * routed.used) * pool.probs).sum(-1)
        return num_experts * (of_probs + of_both - of_both.detach()) / pool.number
    # A mean of a function of single tokens: pooled, it is the mean of the routers' means.
    return PENALTIES[kind](routed, penalty) / pool.number


SPAN_TEMPERATURE = 0.1
"""Of the contrast of spans, as of that of tasks."""
POOLABLE = frozenset({"lb_mixtral", "lb_mola", "lb_llava", "lb_soft", "entropy", "z_loss", "router_ce"})


def _mixtral(routed: View, penalty: Penalty) -> Tensor:
    """E sum_e mean(used_e) mean(p_e), least at k (transformers' Mixtral; MixLoRA, Omni-Effects, Switch at k = 1)."""
    # Who is chosen changes in steps: the gradient goes through the probabilities alone, here and below.
    return routed.probs.shape[-1] * (routed.mean(routed.used.detach()) * routed.mean(routed.probs)).sum(-1)


def _mola(routed: View, penalty: Penalty) -> Tensor:
    """E sum_e f_e mean(p_e) with f the share of all choices, least at 1 (GCYZSL/MoLA)."""
    used = routed.mean(routed.used.detach())
    # Of all choices: k a token, so that the least does not depend on k.
    share = used / used.sum(-1, keepdim=True)
    return routed.probs.shape[-1] * (share * routed.mean(routed.probs)).sum(-1)


def _llava(routed: View, penalty: Penalty) -> Tensor:
    """sum_e mean(p_e) mean(used_e), without the factor E (forwchen/LLaVA-MoLE)."""
    return (routed.mean(routed.used.detach()) * routed.mean(routed.probs)).sum(-1)


def _soft(routed: View, penalty: Penalty) -> Tensor:
    """E sum_e mean(p_e used_e) mean(p_e) (mikecovlee/DynMoLE)."""
    return routed.probs.shape[-1] * (routed.mean(routed.probs * routed.used) * routed.mean(routed.probs)).sum(-1)


def _share(routed: View, penalty: Penalty) -> Tensor:
    """sum_e f_e mean(p_e) with f the share of all choices, without a factor (LoRA-Mixer, reconstruction)."""
    return _mola(routed, penalty) / routed.probs.shape[-1]


def _negative_entropy(routed: View, penalty: Penalty) -> Tensor:
    """- mean H(p), Shannon's in nats: less the more even gates are (LoRA-Mixer, as its loss is printed)."""
    # `tsallis_entropy` is a share of log E; times that it is in nats, as the loss is printed.
    return -math.log(routed.probs.shape[-1]) * routed.mean(tsallis_entropy(routed.probs, 1.0))


def _z_loss(routed: View, penalty: Penalty) -> Tensor:
    """mean (logsumexp l)^2 (ST-MoE)."""
    return routed.mean(routed.logits.logsumexp(-1).square())


def _entropy(routed: View, penalty: Penalty) -> Tensor:
    """Mean entropy of the gates in [0, 1], Tsallis' of the given order; order 1 is Shannon's (DynMoLE)."""
    return routed.mean(tsallis_entropy(routed.probs, penalty.order))


def _localized(routed: View, penalty: Penalty) -> Tensor:
    """Var(Z) / mean(Z)^2, Z = summed gates of a row, times 1 + delta where expert and row are of one group (LoRAMoE).

    Two groups: the first half of the experts belongs to group 1, the rest to group 0. Always over rows and experts of
    the micro batch; with one row over its experts.
    """
    assert routed.group is not None
    num_experts = routed.probs.shape[-1]
    of_expert = (torch.arange(num_experts, device=routed.probs.device) < num_experts // 2).long()
    # A sum over tokens, not a mean: as in the authors' code long rows count more.
    summed = (routed.probs * routed.counted.unsqueeze(-1)).sum(1)
    same = routed.group[:, :1] == of_expert
    weighed = summed * (1 + penalty.delta * (2 * same.to(summed.dtype) - 1))
    # One value for the batch; every group gets it, so that the mean over groups is it.
    # torch's variance is over n - 1, as in the authors' code.
    value = weighed.var() / (weighed.mean().square() + 1e-10)
    return value.expand(len(weighed))


def _cross_entropy(routed: View, penalty: Penalty) -> Tensor:
    """Mean cross entropy of the router against the number of the row's task, one expert a task (MeteoRA)."""
    assert routed.task is not None
    # The logits themselves, before any top-k: an expert that was not chosen learns that it should have been.
    losses = F.cross_entropy(routed.logits.flatten(0, 1), routed.task.flatten(), reduction="none")
    return routed.mean(losses.view(routed.task.shape))


def _base_or_expert(routed: View, penalty: Penalty) -> Tensor:
    """Mean cross entropy of sigmoid gates against which does better on the row, base 0 or expert 1 (GE/LE/GN)."""
    assert routed.task is not None
    better = routed.task.to(routed.logits.dtype).unsqueeze(-1).expand_as(routed.logits)
    return routed.mean(F.binary_cross_entropy_with_logits(routed.logits, better, reduction="none").mean(-1))


def _span_contrast(routed: View, penalty: Penalty) -> Tensor:
    """Contrast of the mean gates of spans of different marks, 0 where a group has one mark (CLoRA, reconstruction).

    mean_m -log( exp(1 / 0.1) / sum_n exp(cos(g_m, g_n) / 0.1) ), g_m the mean gates of the tokens of mark m.
    """
    assert routed.mark is not None
    marks = torch.arange(1, routed.probs.shape[-1] + 1, device=routed.probs.device)
    of_mark = (routed.mark.unsqueeze(-1) == marks) * routed.counted.unsqueeze(-1)
    number = of_mark.sum(1)  # (G, marks)
    mean = of_mark.mT @ routed.probs / number.unsqueeze(-1).clamp_min(1)
    unit = mean / mean.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    is_there = number > 0
    alike = (unit @ unit.mT / SPAN_TEMPERATURE).masked_fill(~is_there.unsqueeze(1), -torch.inf)
    # Of marks that are not there nothing is compared, themselves neither.
    others = torch.where(is_there.unsqueeze(-1), alike, torch.zeros_like(alike)).logsumexp(-1)
    losses = (others - 1 / SPAN_TEMPERATURE) * is_there
    return losses.sum(-1) / is_there.sum(-1).clamp_min(1)


PENALTIES: dict[str, Callable[[View, Penalty], Tensor]] = {
    "lb_mixtral": _mixtral,
    "lb_mola": _mola,
    "lb_llava": _llava,
    "lb_soft": _soft,
    "lb_share": _share,
    "z_loss": _z_loss,
    "entropy": _entropy,
    "negative_entropy": _negative_entropy,
    "localized_balance": _localized,
    "router_ce": _cross_entropy,
    "base_or_expert": _base_or_expert,
    "span_contrast": _span_contrast,
}
# These tell rows apart, whatever the penalty says.
BY_ROW = frozenset({"localized_balance"})

__all__ = ["BY_ROW", "PENALTIES", "POOLABLE", "Pooled", "View", "pooled_value", "view"]
