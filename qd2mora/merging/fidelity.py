"""How much of the adapter an export keeps: per linear from its output, end to end from losses and distributions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from qd2mora.base.passes import OutputHead, labelled, labels_of, output_head
from qd2mora.memory.loss import labelled_states
from qd2mora.merging.static_updates import Statics, replaced
from qd2mora.merging.statistics import Moments, decode, observed
from qd2mora.mixture import MixtureLinear, adapter_off, mixture_layers
from qd2mora.terminal.pace import paced

# Of three models, with a vocabulary of 128,000: 0.4 GB of float32 log-probabilities at once.
TOKENS_AT_ONCE = 256


@dataclass(frozen=True)
class Fidelity:
    """Means over the labelled tokens of held-out rows, in nats; `agreement`: share with the same token ranked first."""

    base: float
    routed: float
    merged: float
    kl_per_token: float
    tokens: int
    agreement: float = 1.0
    tasks: dict[str, "Fidelity"] = field(default_factory=dict)

    @property
    def gain_kept(self) -> float | None:
        """Share of the routed adapter's loss gain that the merged weights keep; None where there was no gain."""
        gain = self.base - self.routed
        return (self.base - self.merged) / gain if gain > 0 else None

    def to_json(self) -> dict[str, object]:
        """Return plain numbers, the tasks' below `tasks`."""
        content: dict[str, object] = {
            "loss": {key: getattr(self, key) for key in ("base", "routed", "merged")},
            "gain_kept": self.gain_kept,
            "kl_per_token": self.kl_per_token,
            "greedy_agreement": self.agreement,
            "held_out_tokens": self.tokens,
        }
        if self.tasks:
            content["tasks"] = {name: each.to_json() for name, each in self.tasks.items()}
        return content


def unexplained(moments: Moments, core_PF: Tensor, up_OP: Tensor) -> float:
    """Return E|B (v - K u)|^2 / E|B v|^2, the share of the adapter's output that a static K misses.

    From moments alone: the error's second moment is E[vv] - K E[uv] - E[vu] K^T + K E[uu] K^T. float64.
    """
    # Moments are of all that reads x linearly; a K that leaves the routers' rows out meets their leading part alone.
    width = core_PF.shape[1]
    # |B e|^2 = e^T (B^T B) e: the output's energy without an output, d_out wide, of any token.
    gram = up_OP.double().T @ up_OP.double()
    cross = core_PF @ moments.vu[:, :width].T
    error = moments.vv - cross - cross.T + core_PF @ moments.uu[:width, :width] @ core_PF.T
    total = float((gram * moments.vv).sum())
    # Where nothing is missed, rounding may leave a little less than nothing.
    return max(0.0, float((gram * error).sum())) / total if total > 0 else 0.0


def missed(
    model: PeftModel, statics: Statics, batches: Sequence[dict[str, Tensor]], adapter_name: str = "default"
) -> dict[str, float]:
    """Return for each linear the share of the adapter's output energy that its static update misses, in one pass.

    The output s B v and the update's s' B' A' x are compared in rank space: [v, A' x] against the banks' own products.
    """
    layers = mixture_layers(model)
    energies = {name: torch.zeros(2, dtype=torch.float64) for name in statics}
    with torch.no_grad():
        banks = {
            name: _joint_gram(layers[name], static.up, static.scaling, adapter_name) for name, static in statics.items()
        }

        def observe(name: str, layer: MixtureLinear, x: Tensor, attended: Tensor) -> None:
            v = layer.rank_space(x, adapter_name)[1][attended]
            mean = layer.mean_input(x, adapter_name)[attended].float()
            # With the update's part negated, the joint Gram matrix sums |s B v - s' B' A' x|^2 in one go.
            joint = torch.cat([v.float(), -mean @ statics[name].down.to(mean).T], 1)
            second = (joint.T @ joint).double().cpu()
            num = v.shape[1]
            gram = banks[name]
            energies[name] += torch.stack([(gram * second).sum(), (gram * second)[:num, :num].sum()])

        for batch in paced("measuring each linear, batches", batches):
            with observed({name: layers[name] for name in statics}, observe, batch["attention_mask"].bool()):
                decode(model, batch)
    return {name: _share(*energy.tolist()) for name, energy in energies.items()}


def _joint_gram(layer: MixtureLinear, up: Tensor, scaling: float, adapter_name: str) -> Tensor:
    columns = layer.scaling(adapter_name) * layer.columns(adapter_name).double().cpu()
    both = torch.cat([columns, scaling * up.double().cpu()], 1)
    return both.T @ both


def _share(missing: float, total: float) -> float:
    return max(0.0, missing) / total if total > 0 else 0.0


def measure(
    model: PeftModel,
    statics: Statics,
    batches: Sequence[dict[str, Tensor]],
    tasks: Sequence[str] = (),
    merged_on: PeftModel | None = None,
) -> Fidelity:
    """Compare base, routed and merged on the labelled tokens of batches, in one pass over them.

    `merged_on`: the same adapter on other weights, which are then the base that the updates are added to.
    `tasks`: names by the rows' task index; each gets a part of its own where there are several.
    """
    # A row a task of what `compare` gives a token: losses of base, routed, merged, KL, agreement, and its count.
    sums = torch.zeros(max(1, len(tasks)), 6, dtype=torch.float64)
    other = model if merged_on is None else merged_on
    with torch.no_grad():
        for batch in paced("measuring on held-out rows, batches", batches):
            targets = labels_of(batch)
            routed = labelled_states(model, batch)
            with replaced(other, statics):
                static = labelled_states(other, batch)
            with adapter_off(other):
                base = labelled_states(other, batch)
            compared = compare((base, routed, static), (output_head(model),) * 3, targets)
            sums.index_add_(0, task_of_token(batch, len(tasks)), compared)
    parts = {}
    if len(tasks) > 1:
        parts = {name: _fidelity(part) for name, part in zip(tasks, sums, strict=True) if part[5]}
    return _fidelity(sums.sum(0), parts)


def _fidelity(sums: Tensor, tasks: dict[str, Fidelity] | None = None) -> Fidelity:
    base, routed, merged, kl, agreed, _ = (sums / sums[5].clamp_min(1)).tolist()
    return Fidelity(base, routed, merged, kl, int(sums[5]), agreed, tasks or {})


def task_of_token(batch: Mapping[str, Tensor], num_tasks: int) -> Tensor:
    """Return the task of each labelled token by number, on the CPU; 0 where there are not several."""
    if num_tasks > 1:
        return batch["task_index"][labelled(batch).nonzero()[:, 0]].cpu()
    return torch.zeros(len(labels_of(batch)), dtype=torch.int64)


def compare(states: Sequence[Tensor], heads: Sequence[OutputHead], targets: Tensor) -> Tensor:
    """Return (tokens, models + 3): each model's loss, KL(last but one | last), whether these two rank the same token
    first, and 1.

    `states`: what each model says of the tokens before its head, (tokens, hidden). The logits of a few hundred tokens
    are there at once.
    """
    rows = []
    for *parts, target in zip(*(tensor.split(TOKENS_AT_ONCE) for tensor in (*states, targets)), strict=True):
        # In float32: a KL of a hundredth of a nat is below what 16 bits hold of a logit.
        logs = [head(part).log_softmax(-1) for head, part in zip(heads, parts, strict=True)]
        losses = [F.nll_loss(log, target, reduction="none") for log in logs]
        # torch's order is (log Q, log P) for KL(P | Q): P is the routed model, which the export imitates.
        kl = F.kl_div(logs[-1], logs[-2], reduction="none", log_target=True).sum(-1)
        agreed = (logs[-1].argmax(-1) == logs[-2].argmax(-1)).float()
        rows.append(torch.stack([*losses, kl, agreed, torch.ones_like(kl)], 1).double().cpu())
    return torch.cat(rows) if rows else torch.zeros(0, len(states) + 3, dtype=torch.float64)


__all__ = ["Fidelity", "compare", "measure", "missed", "task_of_token", "unexplained"]
