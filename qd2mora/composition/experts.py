"""Experts of a trained mixture put in, taken out and made smaller, as FlexMoRE's are (arXiv 2602.08818).

An expert e is A_e, B_e and its row of the router: experts that were trained apart stand side by side, each with its own
row, and one whose row is gone is as if its logit were -inf. How small an expert may be is its spectrum: the ranks that
keep a share of sum over linears of |B_e A_e|_F^2. Pruning by use leaves each linear its own most useful experts: of a
gate that is no softmax, pruning those that do nothing changes nothing, and of a softmax nothing where their gates are
0. All through QR of the factors: no matrix is ever d_out x d_in.

Deviations: FlexMoRE picks ranks by the scores of models of many ranks, here by the share that is kept; a plain LoRA
comes without a row and gets one of zeros, which training has to teach.

Shapes: R rank of one expert, D d_in, O d_out, E experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qd2mora.errors import InputRefused
from qd2mora.mixture import MixtureConfig
from qd2mora.mixture.trained_loras import TrainedLora

Linears = dict[str, dict[str, Tensor]]
"""Tensors by linear and name."""
TAKES_OUT = ("drop-expert", "prune")
"""Operations that leave experts as they are."""
ROWS = (
    *("mixture_router_down", "mixture_bias_down", "mixture_logits_down", "mixture_select_bias_down"),
    "mixture_magnitude",
)
"""Tensors with an entry for each expert, beside its pair."""


@dataclass(frozen=True)
class Expert:
    """A pair of one linear, A (R, D) and B (O, R), and its entries of the router's tensors, where they stand there."""

    down: Tensor
    up: Tensor
    rows: Mapping[str, Tensor]


@dataclass(frozen=True)
class Mixture:
    """A mixture's configuration; experts by linear, one after the other; and its tensors that belong to no expert."""

    config: MixtureConfig
    experts: dict[str, list[Expert]]
    rest: Linears

    @property
    def ranks(self) -> list[int]:
        return self.config.ranks or [self.config.rank or 0] * self.config.num_down


def cut(operation: str, config: MixtureConfig, linears: Linears) -> Mixture:
    """Return a mixture expert by expert. Raises InputRefused where its experts cannot be told apart."""
    gate, row = config.routers.get("down"), config.row
    is_pairs = row.pairing == "tied" and row.core == "none" and gate is not None
    if row.stages and operation not in TAKES_OUT:
        raise InputRefused(f"{operation}: {config.method} adds experts of its own; drop-expert and prune take them out")
    if config.allocation is not None:
        raise InputRefused(
            f"{operation}: adapter.allocation {config.allocation} gives layers different numbers of experts; a mixture "
            "of as many in each will do"
        )
    if not is_pairs or gate is None:
        raise InputRefused(f"{operation}: {config.method} has no pairs of one number in every layer; mola, flexmore do")
    if gate.score not in ("linear", "bias", "static", "prototype") or gate.input in ("task", "task+x", "span"):
        raise InputRefused(f"{operation}: the router of {config.method} has no row for each expert that stands alone")
    ranks = config.ranks or [config.rank or 0] * config.num_down
    experts: dict[str, list[Expert]] = {}
    rest: Linears = {}
    for name, tensors in linears.items():
        down, up = tensors["mixture_A"], tensors["mixture_B"]
        if down.dim() == 3 and len(down) != len(ranks):  # one ungated pair, as attention has in MixLoRA
            experts[name], rest[name] = [], dict(tensors)
            continue
        downs = down.flatten(0, 1).split(ranks) if down.dim() == 3 else down.split(ranks)
        ups = up.unbind() if up.dim() == 3 else up.split(ranks, -1)
        entries = {key: tensors[key] for key in ROWS if key in tensors}
        refuse_lacking(config, name, tensors)
        experts[name] = [
            Expert(downs[number], ups[number], {key: rows[number] for key, rows in entries.items()})
            for number in range(len(ranks))
        ]
        rest[name] = {key: each for key, each in tensors.items() if key not in ("mixture_A", "mixture_B", *ROWS)}
    return Mixture(config, experts, rest)


def refuse_lacking(config: MixtureConfig, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise LookupError where a linear lacks what each of its experts has an entry in."""
    gate, needed = config.routers["down"], []
    # Where linears share a router, it stands in the first of them.
    if gate.scope == "module" and gate.input != "self":
        needed.append("mixture_logits_down" if gate.input == "none" else "mixture_router_down")
        needed += ["mixture_bias_down"] if gate.score == "bias" else []
    if config.experts == "dora":
        needed.append("mixture_magnitude")
    for key in needed:
        if key not in tensors:
            raise LookupError(f"{name} has no {key}")


def joined(
    mixture: Mixture, ranks: Sequence[int], experts: Mapping[str, Sequence[Expert]]
) -> tuple[MixtureConfig, Linears]:
    """Return the configuration and the tensors of other experts in a mixture's place, at its scale s."""
    counts = {"experts": len(ranks)}
    told = list(ranks) if len(set(ranks)) > 1 or mixture.config.row.has_public else None
    before = mixture.config
    # A linear with one expert keeps its rank; where alpha changes, its factor makes up for it.
    of_one = before.attention_rank or (before.rank if not all(experts.values()) else None)
    plain = replace(before, rank=max(ranks), ranks=told, down=counts, up=counts, attention_rank=of_one, alpha=1.0)
    config = replace(plain, alpha=before.scaling / plain.scaling)
    assert before.alpha is not None and config.alpha is not None
    linears: Linears = {}
    for name, found in experts.items():
        tensors = dict(mixture.rest[name])
        if not found:
            tensors["mixture_B"] = tensors["mixture_B"] * (before.alpha / config.alpha)
        else:
            downs, ups = [each.down for each in found], [each.up for each in found]
            alike = len(set(ranks)) == 1
            tensors["mixture_A"] = torch.stack(downs) if alike else torch.cat(downs)
            tensors["mixture_B"] = torch.stack(ups) if alike else torch.cat(ups, -1)
            tensors |= {key: torch.stack([each.rows[key] for each in found]) for key in found[0].rows}
        linears[name] = tensors
    return config, linears


def dropped(mixture: Mixture, numbers: Sequence[int]) -> tuple[MixtureConfig, Linears]:
    """Return the mixture without experts of these numbers, as if their logits were -inf. Raises InputRefused."""
    first, number_of_all = int(mixture.config.row.has_public), len(mixture.ranks)
    for number in numbers:
        if not first <= number < number_of_all:
            raise InputRefused(f"--expert: {number} will not do: from {first} to {number_of_all - 1}")
    kept = [number for number in range(number_of_all) if number not in numbers]
    if len(kept) < 2:
        raise InputRefused(f"--expert: {len(kept)} of {number_of_all} experts would be left; a router chooses among 2")
    return _with_those(mixture, dict.fromkeys(mixture.experts, kept), [mixture.ranks[number] for number in kept])


@dataclass(frozen=True)
class Pruned:
    """What pruning left, and of each linear the share that those left out had of what all its experts did."""

    config: MixtureConfig
    linears: Linears
    lost: list[float]


def pruned(mixture: Mixture, experts: int, shares: Callable[[str], Tensor | None]) -> Pruned:
    """Return the mixture with so many experts in each linear, those that do most there. Raises InputRefused.

    What an expert does is how much it is used, `shares` of a linear (E,), or all alike, times the size of its update,
    |B_e A_e|_F: one that was never opened, or that no router takes, does nothing.
    """
    _refuse_to_prune(mixture.config, experts)
    kept, lost = {}, []
    for name, found in mixture.experts.items():
        use_E, size_E = shares(name), torch.stack([_size(each) for each in found])
        done_E = size_E if use_E is None else size_E * use_E
        best = done_E.argsort(descending=True, stable=True)[:experts].sort().values
        kept[name] = best.tolist()
        total = float(done_E.sum())
        lost.append(1 - float(done_E[best].sum()) / total if total > 0 else 0.0)
    config, linears = _with_those(mixture, kept, mixture.ranks[:experts])
    return Pruned(config, linears, lost)


def _refuse_to_prune(config: MixtureConfig, experts: int) -> None:
    """Refuse mixtures whose linears cannot each keep experts of their own, and sizes that grow. Raises InputRefused."""
    gate = config.routers["down"]
    if config.ranks:
        raise InputRefused(f"prune: the experts of {config.method} differ in rank (adapter.ranks); drop-expert will do")
    if gate.scope != "module":
        raise InputRefused(
            f"prune: linears of {config.method} share a router; drop-expert takes experts out of all alike"
        )
    if config.row.one_expert:
        raise InputRefused(f"prune: {config.method} has one expert in attention; drop-expert takes experts out of MLPs")
    if not 1 <= experts <= config.num_down:
        raise InputRefused(f"--experts: {experts} will not do: from 1 to the {config.num_down} there are")
    if gate.top_k is not None and gate.top_k > experts:
        raise InputRefused(f"--experts: {experts} are fewer than the {gate.top_k} that a token uses")


def _size(expert: Expert) -> Tensor:
    """Return |B A|_F, float64, through <B^T B, A A^T>."""
    up, down = expert.up.double(), expert.down.double()
    return ((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt()


def _with_those(
    mixture: Mixture, kept: Mapping[str, Sequence[int]], ranks: Sequence[int]
) -> tuple[MixtureConfig, Linears]:
    """Return the mixture with some experts of each linear, in their order, with their bits."""
    experts = {
        name: [found[number] for number in kept[name]] if found else [] for name, found in mixture.experts.items()
    }
    return joined(mixture, ranks, experts)


def added(mixture: Mixture, others: Sequence[Mixture | TrainedLora]) -> tuple[MixtureConfig, Linears]:
    """Return the mixture with the experts of others after its own, those of mixtures with their routers' rows.

    Raises InputRefused where they do not fit.
    """
    alone = next((name for name, each in mixture.experts.items() if not each), None)
    if alone is not None:
        raise InputRefused(f"add-expert: {alone} has one expert without a router, beside which none can stand")
    ranks, experts = list(mixture.ranks), {name: list(each) for name, each in mixture.experts.items()}
    for other in others:
        if isinstance(other, TrainedLora):
            ranks.append(other.rank)
            _add_lora(experts, other, mixture.config.scaling)
            continue
        _refuse_unlike(mixture, other)
        first = int(other.config.row.has_public)  # the base is there once
        ranks += other.ranks[first:]
        scale = other.config.scaling / mixture.config.scaling
        for name, found in other.experts.items():
            experts[name] += [replace(each, up=each.up * scale) for each in found[first:]]
    return joined(mixture, ranks, experts)


def _refuse_unlike(mixture: Mixture, other: Mixture) -> None:
    if other.config.routers != mixture.config.routers or other.experts.keys() != mixture.experts.keys():
        raise InputRefused(f"add-expert: a {other.config.method} with other gates or linears; they must be alike")
    # Experts of one mixture all have a magnitude, or none.
    kinds = {each.config.experts for each in (mixture, other)}
    if len(kinds) > 1:
        raise InputRefused("add-expert: experts of one mixture are DoRAs (adapter.experts), the other's are not")


def _add_lora(experts: dict[str, list[Expert]], lora: TrainedLora, scaling: float) -> None:
    if any("mixture_magnitude" in expert.rows for found in experts.values() for expert in found):
        raise InputRefused(f"add-expert: {lora.folder} is a LoRA, and the mixture's experts are DoRAs with magnitudes")
    unknown = sorted(set(lora.pairs) - set(experts))
    if unknown:
        raise InputRefused(f"add-expert: {lora.folder} adapts {unknown[0]}, which the mixture does not")
    for name, found in experts.items():
        d_in, d_out = found[-1].down.shape[1], found[-1].up.shape[0]
        down, up = lora.pairs.get(name, (torch.zeros(lora.rank, d_in), torch.zeros(d_out, lora.rank)))
        if down.shape[1] != d_in or up.shape[0] != d_out:
            raise InputRefused(f"add-expert: {lora.folder}: {name} has another size there: another base")
        rows = {key: torch.zeros_like(row) for key, row in found[-1].rows.items()}
        found.append(Expert(down, up * (lora.scaling / scaling), rows))


def picked(mixture: Mixture, energy: float, most: int | None) -> tuple[MixtureConfig, Linears, float]:
    """Return the mixture with the least rank of each expert that keeps so much of its update, and what is kept of all.

    energy: the share of sum over linears of |B_e A_e|_F^2, above 0 to 1; `most`: no rank above it.
    """
    if not 0 < energy <= 1:
        raise InputRefused(f"--energy: {energy} will not do: a share above 0, up to 1")
    spectra = {name: [_spectrum(each) for each in found] for name, found in mixture.experts.items()}
    ranks, kept, whole = [], 0.0, 0.0
    for number, rank in enumerate(mixture.ranks):
        squares = torch.zeros(rank, dtype=torch.float64)
        for found in spectra.values():
            if found:
                values = found[number][1].square()
                squares[: len(values)] += values
        total = float(squares.sum())
        # Rounding of the last places must not ask for a rank that holds nothing.
        enough = int((squares.cumsum(0) < energy * total * (1 - 1e-9)).sum()) + 1
        chosen = min(enough, rank, most or rank)
        ranks.append(chosen)
        kept, whole = kept + float(squares[:chosen].sum()), whole + total
    experts = {
        name: [
            _truncated(*pair, rank)
            for pair, rank in zip(zip(mixture.experts[name], found, strict=True), ranks, strict=True)
        ]
        for name, found in spectra.items()
        if found
    }
    experts |= {name: [] for name, found in spectra.items() if not found}
    config, linears = joined(mixture, ranks, {name: experts[name] for name in mixture.experts})
    return config, linears, kept / whole if whole else 1.0


Spectrum = tuple[Tensor, Tensor, Tensor]


def _spectrum(expert: Expert) -> Spectrum:
    """Return U (O, R), S (R) and V^T (R, D) of B A in float64, through the factors' QR."""
    left, upper = torch.linalg.qr(expert.up.double())
    right, lower = torch.linalg.qr(expert.down.double().T)
    u, values, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return left @ u, values, vh @ right.T


def _truncated(expert: Expert, spectrum: Spectrum, rank: int) -> Expert:
    if rank == expert.down.shape[0]:
        return expert
    u, values, vh = spectrum
    # Half of each singular value on either side, so that both factors learn at one pace.
    root = values[:rank].sqrt()
    down, up = root.unsqueeze(-1) * vh[:rank], u[:, :rank] * root
    return replace(expert, down=down.float(), up=up.float())


__all__ = ["Mixture", "Pruned", "added", "cut", "dropped", "joined", "picked", "pruned", "refuse_lacking"]
