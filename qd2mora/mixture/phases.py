"""How routing changes while it is learned: uniform, softer, denser gates at first, penalties that rise.

A phase is a function of the step's number and holds in training alone: an adapter that is evaluated, exported or
resumed has the gates of its configuration.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from qd2mora.routed.gate import Gate
from qd2mora.routed.ops import RankStep


@dataclass(frozen=True)
class Sparsity:
    """How many experts a top-k uses on its way from many to its own (progressive sparsification, arXiv 2512.16248).

    first: at the start. way: how far the highest layer is, 1 at the end and more after it. later: how far the lowest is
    behind, others in proportion.
    """

    first: int
    way: float
    later: float = 0.0

    def top_k(self, own: int, num_experts: int, height: float) -> int:
        """Return the experts that a gate uses whose own number is `own`, in a layer from 0, the lowest, to 1."""
        done = min(1.0, max(0.0, self.way - self.later * (1 - height)))
        # Up, so that the end is reached where the way is done and not before.
        return min(num_experts, own + math.ceil(max(0, self.first - own) * (1 - done)))


@dataclass(frozen=True)
class Phase:
    """What is other than at the end: whether experts count alike, what temperatures and penalties are multiplied by.

    sparsity: how many experts a top-k uses, where that falls.
    is_open: every expert counts whole, whatever its gate says; in an evaluation too.
    """

    is_uniform: bool = False
    temperature: float = 1.0
    penalty: float = 1.0
    sparsity: Sparsity | None = None
    is_open: bool = False


PLAIN = Phase()


def gate_in(gate: Gate, phase: Phase, num_experts: int, height: float = 1.0) -> Gate:
    """Return a gate as it is in a phase of training; a uniform one gives each of E experts its part of what all count.

    One that is soft in training alone is dense there, in every phase. `height`: of the layer, from 0 to 1.
    """
    if phase.is_open:
        return _alike(gate, 1.0)
    if gate.weight == "soft":
        gate = replace(gate, weight="dense")
    if phase.sparsity is not None and gate.select == "top_k" and gate.top_k is not None:
        gate = replace(gate, top_k=phase.sparsity.top_k(gate.top_k, num_experts, height))
    if phase.is_uniform and gate.select != "fixed":
        weight = _together(gate, num_experts) / num_experts
        return _alike(gate, weight)
    return replace(gate, temperature=gate.temperature * phase.temperature)


def _alike(gate: Gate, weight: float) -> Gate:
    plain = replace(gate, select="all", weight="uniform", omega=weight, top_k=None)
    return replace(plain, bias_rate=0.0, guidance=0.0, dropout=0.0)


@lru_cache(maxsize=4096)
def step_in(step: RankStep, phase: Phase, counts: tuple[tuple[str, int], ...], height: float = 1.0) -> RankStep:
    """Return a linear's step as it is in a phase; `counts`: the experts that each role chooses among."""
    among = dict(counts)
    return replace(step, gates=tuple((role, gate_in(gate, phase, among[role], height)) for role, gate in step.gates))


def _together(gate: Gate, num_experts: int) -> float:
    """Return what experts count together where all scores are zero."""
    used = min(gate.top_k or num_experts, num_experts) if gate.select != "all" else num_experts
    match gate.weight:
        case "softmax":
            # An entropy gate takes all where it is unsure; a top-k is not renormalised.
            return used / num_experts if gate.select in ("top_k", "sample") else 1.0
        case "sigmoid":
            return 0.5 * used
        case "uniform" | "straight_through":
            return gate.omega * used
        case "one" | "sigmoid_renorm":
            return float(used)
        case "bounded":
            return float(num_experts)
    return 1.0  # renorm


__all__ = ["PLAIN", "Phase", "Sparsity", "gate_in", "step_in"]
