"""How much of the adapter an export keeps: per linear from moments, end to end from losses and distributions."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from qd2mora.memory.loss import IGNORE, labelled_states, output_head
from qd2mora.merging.statistics import Moments
from qd2mora.mixture import MixtureLinear, mixture_layers

TOKENS_AT_ONCE = 256


@dataclass(frozen=True)
class Fidelity:
    """Means over the labelled tokens of held-out rows, in nats."""

    base: float
    routed: float
    merged: float
    kl_per_token: float
    tokens: int

    @property
    def gain_kept(self) -> float | None:
        """Share of the routed adapter's loss gain that the merged weights keep; None where there was no gain."""
        gain = self.base - self.routed
        return (self.base - self.merged) / gain if gain > 0 else None


def unexplained(moments: Moments, mixing_PQ: Tensor, up_OP: Tensor) -> float:
    """Return E|B (v - K u)|^2 / E|B v|^2, the share of the adapter's output that a static K misses.

    From moments alone: the error's second moment is E[vv] - K E[uv] - E[vu] K^T + K E[uu] K^T. float64.
    """
    gram = up_OP.double().T @ up_OP.double()
    cross = mixing_PQ @ moments.vu.T
    error = moments.vv - cross - cross.T + mixing_PQ @ moments.uu @ mixing_PQ.T
    total = float((gram * moments.vv).sum())
    return max(0.0, float((gram * error).sum())) / total if total > 0 else 0.0


@contextmanager
def merged(model: PeftModel, mixing: dict[str, Tensor], adapter_name: str = "default") -> Iterator[None]:
    """Let every adapted linear use its static K, as the merged weights will, while the block runs."""
    layers: dict[str, MixtureLinear] = mixture_layers(model)
    for name, layer in layers.items():
        device = layer.tensors(adapter_name)["mixture_A"].device
        layer.static_mixing[adapter_name] = mixing[name].float().to(device)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.static_mixing[adapter_name]


def measure(model: PeftModel, mixing: dict[str, Tensor], batches: Iterable[dict[str, Tensor]]) -> Fidelity:
    """Compare base, routed and merged on the labelled tokens of batches, in one pass over them."""
    sums = torch.zeros(4, dtype=torch.float64)
    tokens = 0
    with torch.no_grad():
        for batch in batches:
            keep = batch["labels"][:, 1:] != IGNORE
            targets = batch["labels"][:, 1:][keep]
            routed = labelled_states(model, batch, keep)
            with merged(model, mixing):
                static = labelled_states(model, batch, keep)
            with model.disable_adapter():
                base = labelled_states(model, batch, keep)
            sums += _compare(base, routed, static, targets, output_head(model))
            tokens += len(targets)
    base_loss, routed_loss, merged_loss, kl = (sums / max(1, tokens)).tolist()
    return Fidelity(base_loss, routed_loss, merged_loss, kl, tokens)


def _compare(base: Tensor, routed: Tensor, static: Tensor, targets: Tensor, head: torch.nn.Module) -> Tensor:
    """Return summed losses of the three and the summed KL(routed | merged); a few hundred tokens' logits at once."""
    sums = torch.zeros(4, dtype=torch.float64)
    parts = zip(*(tensor.split(TOKENS_AT_ONCE) for tensor in (base, routed, static, targets)), strict=True)
    for base_part, routed_part, static_part, target in parts:
        logs = [head(states).float().log_softmax(-1) for states in (base_part, routed_part, static_part)]
        losses = [F.nll_loss(log, target, reduction="sum") for log in logs]
        kl = F.kl_div(logs[2], logs[1], reduction="sum", log_target=True)
        sums += torch.stack([*losses, kl]).double().cpu()
    return sums


__all__ = ["Fidelity", "measure", "merged", "unexplained"]
