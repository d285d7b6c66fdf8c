"""How routing changes while it is learned: uniform gates at first, softer ones for a while, penalties that rise.

A phase is a function of the step's number and holds in training alone: an adapter that is evaluated, exported or
resumed has the gates of its configuration.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from qd2mora.routed.gate import Gate
from qd2mora.routed.ops import RankStep


@dataclass(frozen=True)
class Phase:
    """What is other than at the end: whether experts count alike, what temperatures and penalties are multiplied by."""

    is_uniform: bool = False
    temperature: float = 1.0
    penalty: float = 1.0


PLAIN = Phase()


def gate_in(gate: Gate, phase: Phase, num_experts: int) -> Gate:
    """Return a gate as it is in a phase of training; a uniform one gives each of E experts its part of what all count.

    One that is soft in training alone is dense there, in every phase.
    """
    if gate.weight == "soft":
        gate = replace(gate, weight="dense")
    if phase.is_uniform and gate.select != "fixed":
        weight = _together(gate, num_experts) / num_experts
        return replace(gate, select="all", weight="uniform", omega=weight, top_k=None, bias_rate=0.0, dropout=0.0)
    return replace(gate, temperature=gate.temperature * phase.temperature)


@lru_cache(maxsize=4096)
def step_in(step: RankStep, phase: Phase, counts: tuple[tuple[str, int], ...]) -> RankStep:
    """Return a linear's step as it is in a phase; `counts`: the experts that each role chooses among."""
    among = dict(counts)
    return replace(step, gates=tuple((role, gate_in(gate, phase, among[role])) for role, gate in step.gates))


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


__all__ = ["PLAIN", "Phase", "gate_in", "step_in"]
