"""Slow, obvious twins of the product in float64: loops over tokens and experts, straight from the formulas."""

import math

import torch
from torch import Tensor


def softmax(logits: Tensor) -> Tensor:
    """Return exp(l) over its sum."""
    weights = (logits - logits.max()).exp()
    return weights / weights.sum()


def delta(method: str, x_TD: Tensor, tensors: dict[str, Tensor], scaling: float, tasks: Tensor | None = None) -> Tensor:
    """Return the adapter's output (T, O), token by token; `tasks` (T,) where the method routes by task."""
    rows = []
    for number, x in enumerate(x_TD):
        rows.append(_delta_of_token(method, x, tensors, None if tasks is None else int(tasks[number])))
    return scaling * torch.stack(rows)


def _delta_of_token(method: str, x: Tensor, tensors: dict[str, Tensor], task: int | None) -> Tensor:
    downs, ups = list(tensors["mixture_A"]), list(tensors["mixture_B"])
    if method == "lora":
        return ups[0] @ (downs[0] @ x)
    if method == "moslora":
        return ups[0] @ (tensors["mixture_core"] @ (downs[0] @ x))
    if method == "moelora":
        assert task is not None
        gates = softmax(tensors["mixture_router_task"] @ tensors["mixture_task_embedding"][task])
        return sum(gate * (up @ (down @ x)) for gate, up, down in zip(gates, ups, downs, strict=True))
    if method == "hydralora":
        z = downs[0] @ x
        gates = softmax(tensors["mixture_router_up"] @ x)
        return sum(gate * (up @ z) for gate, up in zip(gates, ups, strict=True))
    assert method == "d2mora"
    gates_down = softmax(tensors["mixture_router_down"] @ x)
    z = sum(gate * (down @ x) for gate, down in zip(gates_down, downs, strict=True))
    gates_up = softmax(tensors["mixture_router_up"] @ z)
    return sum(gate * (up @ z) for gate, up in zip(gates_up, ups, strict=True))


def overlap(banks: list[Tensor], eps: float = 1e-6) -> Tensor:
    """Return the sum of |cos| over pairs of experts in each bank, pair by pair; zero experts count nothing."""
    total = torch.zeros((), dtype=torch.float64)
    for bank in banks:
        experts = [expert.flatten() for expert in bank]
        for i in range(len(experts)):
            for j in range(i + 1, len(experts)):
                p, q = experts[i], experts[j]
                if p.detach().any() and q.detach().any():
                    total = total + (p @ q / ((p.norm() + eps) * (q.norm() + eps))).abs()
    return total


def nll(logits: Tensor, targets: Tensor) -> float:
    """Return the mean negative log-likelihood over targets that are not -100, token by token."""
    losses = []
    for row, target in zip(logits.double(), targets.tolist(), strict=True):
        if target != -100:
            losses.append(-math.log(float(softmax(row)[target])))
    return sum(losses) / len(losses)
