"""Contrast decoding (SCMoE, arXiv 2405.14507): what the routed model says, less what it says with weak routing.

With s the routed model's logits and w the weak one's, tokens with s < log(alpha) + max s are left out, and of the
others the score is (1 + beta) s - beta w. The weak one is the base without the adapter (`base`), the adapter with the
likeliest expert of each gate alone (`top1`), or with all experts alike (`uniform`). With beta 0 it is greedy decoding.
Source: github DavidFanzz/SCMoE, whose weak model is the same mixture with other experts; here experts are low-rank.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from qd2mora.errors import InputRefused
from qd2mora.evaluation.joint import BEGIN, Step, Voice
from qd2mora.evaluation.subject import Subject
from qd2mora.mixture import MixtureLinear, mixture_layers
from qd2mora.mixture.spec import LinearSpec
from qd2mora.routed.gate import Gate

WEAK = ("base", "top1", "uniform")
_SUM_TO_ONE = ("softmax", "renorm", "dense", "soft", "equal", "straight_through")


@dataclass(frozen=True)
class Contrast:
    """What is contrasted with, how strongly (`beta`), and how likely a token must be beside the likeliest (`alpha`)."""

    weak: str
    beta: float = 0.5
    alpha: float = 0.1

    def __post_init__(self) -> None:
        if self.weak not in WEAK:
            raise InputRefused(f"--contrast: '{self.weak}' will not do: {', '.join(WEAK[:-1])} or {WEAK[-1]}")
        if not 0 <= self.beta < math.inf:
            raise InputRefused(f"--beta: {self.beta} will not do: a number, at least 0")
        if not 0 < self.alpha <= 1:
            raise InputRefused(f"--alpha: {self.alpha} will not do: above 0, up to 1")

    def blend(self, scores_VW: Tensor, step: Step = BEGIN) -> Tensor:
        """Return the contrasted scores of the routed model's and the weak one's."""
        strong, weak = scores_VW
        # SCMoE's score. Unlikely tokens are ruled out by the strong model alone: of two that it finds absurd, the
        # difference would choose the one that the weak model finds the more absurd.
        found = (1 + self.beta) * strong - self.beta * weak
        return found.masked_fill(strong < math.log(self.alpha) + strong.max(), -torch.inf)

    def voices(self, subject: Subject) -> list[Voice]:
        """Return the routed model and the weak one. Raises InputRefused where there is nothing to weaken."""
        if not subject.is_adapted:
            raise InputRefused("--contrast: this model has no adapter beside its base; name a run or a LoRA")
        if not subject.may_fork:
            raise InputRefused(
                "--contrast: a router of this adapter keeps something of each prompt (a mean over it, or a first "
                "pass), and cannot read it in two ways at once"
            )
        if self.weak == "base":
            return [Voice(subject), Voice(subject, subject.without_adapter)]
        return [Voice(subject), Voice(subject, partial(_with_specs, _weakened(subject, self.weak)))]


def _weakened(subject: Subject, weak: str) -> list[tuple[MixtureLinear, dict[str, LinearSpec]]]:
    """Return each linear with the specs it has while its gates are weak."""
    # Specs are exchanged and tensors are not: both voices read the same weights, and the rank step's kernels take gates
    # from the spec.
    found, are_any = [], False
    for layer in mixture_layers(subject.model).values():
        specs = {}
        for adapter, spec in layer.mixture_spec.items():
            gates = tuple((role, weak_gate(gate, spec.counts[role], weak)) for role, gate in spec.step.gates)
            are_any = are_any or gates != spec.step.gates
            specs[adapter] = replace(spec, step=replace(spec.step, gates=gates))
        found.append((layer, specs))
    if not are_any:
        raise InputRefused(f"--contrast: {weak} weakens gates, and no gate of this adapter chooses; base will do")
    return found


def weak_gate(gate: Gate, num_experts: int, weak: str) -> Gate:
    """Return a gate that takes its likeliest expert alone (`top1`), or all alike (`uniform`).

    The sum of the gates stays what it was, where the weights have one. Gates that choose nothing stay as they are.
    """
    if gate.input == "none" or gate.select == "fixed":
        return gate
    if weak == "top1":
        # Renormalised, the likeliest expert counts one alone, as all did together: the weak model differs in who works,
        # and not in how much the adapter adds.
        weight = "renorm" if gate.weight in _SUM_TO_ONE else gate.weight
        return replace(gate, select="top_k", top_k=1, weight=weight)
    used = min(gate.top_k or num_experts, num_experts)
    total = {"one": float(used), "uniform": gate.omega * used, "sigmoid_renorm": float(used)}.get(gate.weight, 1.0)
    # Sigmoids have no sum of their own: a half each is what they have at scores of zero.
    if gate.weight == "sigmoid":
        total = num_experts / 2
    return replace(gate, select="all", top_k=None, weight="uniform", omega=total / num_experts)


@contextmanager
def _with_specs(changed: list[tuple[MixtureLinear, dict[str, LinearSpec]]]) -> Iterator[None]:
    before = [dict(layer.mixture_spec) for layer, _ in changed]
    try:
        for layer, specs in changed:
            layer.mixture_spec.update(specs)
        yield
    finally:
        for (layer, _), specs in zip(changed, before, strict=True):
            layer.mixture_spec.update(specs)


__all__ = ["WEAK", "Contrast", "weak_gate"]
