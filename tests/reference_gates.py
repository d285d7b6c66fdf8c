"""Gates of one token in float64, straight from the formulas: Python chooses, torch weighs.

Each takes the logits (E,) of one token and returns the weights (E,).
"""

import math

import torch
from reference import softmax
from torch import Tensor


def largest(values: Tensor, number: int) -> list[int]:
    """Return the places of the largest entries, the largest first."""
    plain = values.detach().tolist()
    return sorted(range(len(plain)), key=lambda place: -plain[place])[:number]


def mask(places: list[int], number: int) -> Tensor:
    """Return 1 at the places, else 0."""
    return torch.tensor([float(place in places) for place in range(number)], dtype=torch.float64)


def renormalised(logits: Tensor, k: int) -> Tensor:
    """Return softmax over all, cut to the k largest, divided by what is left."""
    probs = softmax(logits)
    kept = probs * mask(largest(logits, k), len(logits))
    return kept / kept.sum()


def softmax_of_chosen(logits: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """Return softmax over the k largest logits alone (MeteoRA's path B)."""
    places = largest(logits, k)
    weights = torch.zeros(len(logits), dtype=torch.float64)
    return weights.index_put((torch.tensor(places),), softmax(logits[places] / temperature))


def tsallis(probs: Tensor, order: float, eps: float = 1e-5) -> float:
    """Return S_q / max S_q; order 1 is Shannon's over log E."""
    plain = probs.detach().tolist()
    num = len(plain)
    if order == 1:
        return -sum(p * math.log(p + eps) for p in plain) / math.log(num)
    value = (1 - sum((p + eps) ** order for p in plain)) / (order - 1)
    return value / ((1 - num ** (1 - order)) / (order - 1))


def top_p(probs: Tensor, limit: float, least: int) -> Tensor:
    """Return the mask of the likeliest whose sum stays within the limit, at least so many."""
    kept, total, plain = [], 0.0, probs.detach().tolist()
    for rank, place in enumerate(largest(probs, len(probs))):
        total += plain[place]
        if rank < least or total <= limit:
            kept.append(place)
    return mask(kept, len(probs))


def by_entropy(logits: Tensor, order: float, limit: float, p: float, least: int) -> Tensor:
    """Return DynMoLE's gate: top-p with at least `least`, all where the entropy is above the limit; never rescaled."""
    probs = softmax(logits)
    if tsallis(probs, order) > limit:
        return probs
    return probs * top_p(probs, p, least)


def straight_through(logits: Tensor, chosen: list[int], omega: float) -> Tensor:
    """Return omega on the chosen, with the gradient of the softmax."""
    probs = softmax(logits)
    return omega * mask(chosen, len(logits)) + probs - probs.detach()


def self_activated(u: Tensor, k: int, temperature: float) -> Tensor:
    """Return MoRA's gate of rank units: softmax(|u| / (|u|_2 T)), cut to the k largest."""
    return softmax(u.abs() / u.norm() / temperature) * mask(largest(u.abs(), k), len(u))


def sigmoid_parts(logits: Tensor) -> Tensor:
    """Return twice the two largest sigmoids' parts of their sum."""
    values = 1 / (1 + torch.exp(-logits))
    kept = values * mask(largest(values, 2), len(values))
    return 2 * kept / kept.sum()


def bounded(logits: Tensor) -> Tensor:
    """Return ScaleZero's factors, within 0.8 and 1.2."""
    return 1 + 0.2 * torch.tanh(logits)


def dense(logits: Tensor, hidden: Tensor) -> Tensor:
    """Return the matrix times the vector, entry by entry."""
    return torch.stack([(row * hidden).sum() for row in logits])
