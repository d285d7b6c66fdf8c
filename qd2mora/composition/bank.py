"""Choosing LoRAs from a bank by a few labelled rows, and rows from a pool that are like them (K-shot open knowledge).

Source: Rocket (github Yaphabates/Rocket). A candidate's score is its accuracy on the K rows and its perplexity on their
answers, here as accuracy + 1 / perplexity a token, so that both lie within 0 and 1. A set of candidates is worth its
scores less what its members' updates are alike: sum_i score_i - likeness sum_{i<j} |cos(B_i A_i, B_j A_j)|. Ours: who
is hardly better than the base alone is left out, and of two that are nearly the same update the better one stays.

Of the pool rows are taken in the order of how near their prompts are to the mean of the K rows', and none that is
within a cosine distance of 0.1 of a row that there is: contexts are the mean last states of the base, centred on the
pool.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qd2mora.mixture.trained_loras import TrainedLora

COPY = 0.95
"""Cosine of two updates from which on one is a copy of the other."""
LEAST_GAIN = 0.1
"""Share of what the best adds to the base's score; who adds less has learned the form of answers at most."""
NEAR = 0.1
"""Cosine distance within which a row says nothing new."""
MOST_SETS = 50_000
"""Sets that are looked at all; of more the best is built up one by one."""


@dataclass(frozen=True)
class Candidate:
    """What a LoRA does on the K rows: the share that is right, and nats a token of the right answers."""

    folder: str
    accuracy: float
    loss: float

    @property
    def score(self) -> float:
        """accuracy + 1 / perplexity."""
        return self.accuracy + math.exp(-self.loss)

    @property
    def line(self) -> str:
        """Its numbers in words."""
        return f"{self.accuracy:.0%} right, loss a token {self.loss:.3f}, score {self.score:.3f}"


@dataclass(frozen=True)
class Chosen:
    """Numbers of the candidates that were chosen, and why each other was not."""

    numbers: list[int]
    left_out: dict[int, str]


def chosen_of(
    candidates: Sequence[Candidate], base: Candidate, likeness_EE: Tensor, keep: int, weight: float
) -> Chosen:
    """Choose up to `keep` candidates whose scores are high and whose updates are unlike."""
    best_gain = max(each.score for each in candidates) - base.score
    left_out = {
        number: f"hardly better than the base alone (score {base.score:.3f})"
        for number, each in enumerate(candidates)
        if each.score - base.score <= max(0.0, LEAST_GAIN * best_gain)
    }
    by_score = sorted(set(range(len(candidates))) - set(left_out), key=lambda number: -candidates[number].score)
    good: list[int] = []
    for number in by_score:
        copied = next((other for other in good if likeness_EE[number, other] >= COPY), None)
        if copied is None:
            good.append(number)
        else:
            left_out[number] = f"a copy of {candidates[copied].folder} (cosine {likeness_EE[number, copied]:.2f})"
    scores = torch.tensor([each.score for each in candidates], dtype=torch.float64)
    best = _best_set(good, scores, likeness_EE.double(), keep, weight)
    for number in set(good) - set(best):
        left_out[number] = "others are better, or less alike"
    return Chosen(best, left_out)


def _best_set(good: list[int], scores_E: Tensor, likeness_EE: Tensor, keep: int, weight: float) -> list[int]:
    def worth(members: Iterable[int]) -> float:
        members = list(members)
        alike = sum(float(likeness_EE[one, other]) for one, other in itertools.combinations(members, 2))
        return float(scores_E[members].sum()) - weight * alike

    keep = min(keep, len(good))
    # Worth is not a sum over members (pairs count against it), so that the best set need not hold the best candidate.
    if math.comb(len(good), keep) <= MOST_SETS:
        return list(max(itertools.combinations(good, keep), key=worth))
    found: list[int] = []
    while len(found) < keep:
        left = [number for number in good if number not in found]
        found = max(([*found, number] for number in left), key=worth)
    return found


def likeness(loras: Sequence[TrainedLora]) -> Tensor:
    """Return the absolute cosine between the whole updates of LoRAs, (E, E), by their factors alone."""
    inner = torch.zeros(len(loras), len(loras), dtype=torch.float64)
    for one, other in itertools.combinations_with_replacement(range(len(loras)), 2):
        for name in loras[one].pairs.keys() & loras[other].pairs.keys():
            (A, B), (C, D) = loras[one].pairs[name], loras[other].pairs[name]
            # <B A, D C> = sum of (B^T D) * (A C^T): no update is ever d_out x d_in.
            product = ((B.T @ D) * (A @ C.T)).double().sum() * loras[one].scaling * loras[other].scaling
            inner[one, other] += product
        inner[other, one] = inner[one, other]
    norm = inner.diagonal().clamp_min(0).sqrt().clamp_min(1e-300)
    return (inner / torch.outer(norm, norm)).abs().clamp_max(1)


def near_and_new(pool_NH: Tensor, few_KH: Tensor, number: int) -> list[int]:
    """Return the rows of the pool that are nearest to the mean of the few and near no row that there is."""
    # Mean states of one model all point nearly the same way: without the common part cosines tell rows apart.
    center = pool_NH.mean(0)
    pool, few = (_unit(points - center) for points in (pool_NH, few_KH))
    # Stable: of rows that are as near, the one that stands first in the file.
    order = (pool @ _unit((few_KH - center).mean(0, keepdim=True))[0]).argsort(descending=True, stable=True)
    taken: list[int] = []
    for place in order.tolist():
        there = torch.cat([few, pool[taken]])
        if float((there @ pool[place]).max()) <= 1 - NEAR:
            taken.append(place)
        if len(taken) == number:
            break
    return taken


def _unit(points: Tensor) -> Tensor:
    return points / points.norm(dim=-1, keepdim=True).clamp_min(1e-300)


__all__ = ["Candidate", "Chosen", "chosen_of", "likeness", "near_and_new"]
