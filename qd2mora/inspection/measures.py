"""What sums over tokens say of one router, as pure functions of float64 tensors.

A token's gates are weighed to sum to one: g. Tasks count alike, however many tokens they bring. `load` is what each
expert gets: the share of choices where a router selects, the mean of g where every expert is used. Dense gates say who
they favour by their largest entry, so that information is about the same thing for all: the expert that was chosen.

Sources: effective number of experts (sum g)^2 / sum g^2 (ReMix's support size); I(task; expert) of the most weighed.

Shapes: K tasks, E experts.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

COLLAPSED = 0.95
"""Load on as few experts as a token uses, from which on a router has stopped choosing."""
DEAD = 0.01
"""Share of an equal load below which an expert is dead."""


@dataclass(frozen=True)
class RouterMeasures:
    """One router. Entropies are within 0 and 1, information is in nats; loads are relative to an equal share.

    usage: task x expert, the mean of g; None for a task without tokens. weight: the same of the gates as they are.
    entropy: of single tokens; entropy_of_mean: of `load`. effective_experts: exp of the entropy of `load`;
    effective_per_token: the mean of 1 / sum g^2. Where there is one expert, entropies are None.
    """

    tokens: list[int]
    usage: list[list[float] | None]
    weight: list[list[float] | None]
    load: list[float]
    entropy: float | None
    entropy_of_mean: float | None
    effective_experts: float
    effective_per_token: float
    max_load: float
    min_load: float
    dead: list[int]
    mutual_information: float
    mutual_information_of_weights: float
    top_share: float


def width(num_experts: int) -> int:
    """Return the numbers of one task's sums: tokens, entropy, 1 / sum g^2, then g, gates and choices by expert."""
    return 3 + 3 * num_experts


def token_sums(gates: Tensor, chosen: Tensor | None, counted: Tensor) -> Tensor:
    """Return what is summed over the counted tokens of each row, (B, width), of gates (B, n, E) and counted (B, n)."""
    # Gates that need not sum to one, as sigmoids, are weighed to: only then is their entropy one of shares.
    total = gates.sum(-1, keepdim=True)
    g = gates / total.clamp_min(torch.finfo(gates.dtype).tiny)
    entropy = torch.special.entr(g).sum(-1, keepdim=True)
    # 1 / sum g^2 is 1 where one expert has all, E where all are alike; the floor is for a token that gates nothing.
    inverse = 1 / g.square().sum(-1, keepdim=True).clamp_min(torch.finfo(g.dtype).eps)
    if chosen is None:
        # Dense gates choose nobody; their favourite stands for the choice, so that information is of one kind for all.
        choice = torch.zeros_like(g).scatter_(-1, g.argmax(-1, keepdim=True), 1.0)
    else:
        choice = chosen / chosen.sum(-1, keepdim=True).clamp_min(1)
    each = torch.cat([torch.ones_like(entropy), entropy, inverse, g, gates, choice], -1)
    return (each * counted.unsqueeze(-1)).sum(1)


def measure(sums: Tensor, is_sparse: bool, at_once: int = 1) -> RouterMeasures:
    """Return what sums (K, width) of a router say; `at_once`: experts that a token uses at least."""
    num_experts = (sums.shape[1] - 3) // 3
    seen = sums[:, 0] > 0
    if not bool(seen.any()):
        raise ValueError("a router that saw no token has no measures")
    # By task first: a task with many tokens says no more of a router than one with few.
    means = sums / sums[:, :1].clamp_min(1)
    entropies, inverses = means[seen, 1], means[seen, 2]
    g, gates, choice = means[:, 3:].split(num_experts, -1)
    shares = choice if is_sparse else g
    load = shares[seen].mean(0)
    # A token may have chosen nobody (a capacity that is full), so that shares need not sum to one.
    load = load / load.sum().clamp_min(torch.finfo(load.dtype).tiny)
    spread = float(torch.special.entr(load).sum())
    is_known = seen.tolist()
    return RouterMeasures(
        tokens=[int(number) for number in sums[:, 0].tolist()],
        usage=_known(g, is_known),
        weight=_known(gates, is_known),
        load=load.tolist(),
        entropy=float(entropies.mean()) / math.log(num_experts) if num_experts > 1 else None,
        entropy_of_mean=spread / math.log(num_experts) if num_experts > 1 else None,
        effective_experts=math.exp(spread),
        effective_per_token=float(inverses.mean()),
        max_load=num_experts * float(load.max()),
        min_load=num_experts * float(load.min()),
        dead=(num_experts * load < DEAD).nonzero().flatten().tolist(),
        mutual_information=mutual_information(choice[seen]),
        mutual_information_of_weights=mutual_information(g[seen]),
        top_share=float(load.topk(min(at_once, num_experts)).values.sum()),
    )


def mutual_information(shares_KE: Tensor) -> float:
    """Return I(task; expert) in nats where tasks are equally likely and expert e has shares[k, e] in task k."""
    total = shares_KE.sum(-1, keepdim=True)
    shares = shares_KE / torch.where(total > 0, total, torch.ones_like(total))
    # I = H(mean over tasks) - mean over tasks of H; rounding may leave that of independent ones a hair below zero.
    whole = torch.special.entr(shares.mean(0)).sum()
    return max(0.0, float(whole - torch.special.entr(shares).sum(-1).mean()))


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are there, None where none is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return sum(known) / len(known)


def _known(values: Tensor, is_known: list[bool]) -> list[list[float] | None]:
    return [row if known else None for row, known in zip(values.tolist(), is_known, strict=True)]


__all__ = ["COLLAPSED", "RouterMeasures", "mean_of_known", "measure", "mutual_information", "token_sums", "width"]
