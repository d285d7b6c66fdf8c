"""Pruning by use: a mixture of pairs without the experts that do least.

What an expert does is how much it is used (`expert_use`; without rows, all alike) times the size of its update,
|B_e A_e|_F: one that was never opened, or that no router takes, does nothing. Each linear keeps its own most useful
ones, in their order, with their bits; a softmax shares out among them what the others had. So pruning experts that do
nothing of a gate that is no softmax changes nothing, and of a softmax nothing where their gates are 0.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qd2mora.composition.sub_moe import rank_of_scale
from qd2mora.errors import InputRefused
from qd2mora.mixture import MixtureConfig

_BY_EXPERT = ("A", "B", "router_down", "bias_down", "logits_down", "select_bias_down")


def refuse_unfit(config: MixtureConfig, experts: int, has_rows: bool) -> None:
    """Refuse mixtures whose experts cannot be taken out one by one, and sizes that grow. Raises InputRefused."""
    gate = config.routers.get("down")
    if config.row.pairing != "tied" or config.row.core != "none" or config.ranks or config.shared or gate is None:
        raise InputRefused(
            f"prune: {config.method} is no mixture of plain pairs of one rank; loramoe and scalezero are"
        )
    if config.allocation is not None:
        raise InputRefused("prune: an allocation by depth gives layers different numbers of experts")
    if gate.scope != "module" or gate.score not in ("linear", "bias", "static") or gate.select == "fixed":
        raise InputRefused(f"prune: the router of {config.method} has more of its experts than a row for each")
    if has_rows and gate.input == "none":
        raise InputRefused(f"--on: the gate of {config.method} reads no row; leave it out")
    if not 1 <= experts <= config.num_down:
        raise InputRefused(f"--experts: {experts} will not do: from 1 to the {config.num_down} there are")
    if gate.top_k is not None and gate.top_k > experts:
        raise InputRefused(f"--experts: {experts} are fewer than the {gate.top_k} that a token uses")


def pruned_config(config: MixtureConfig, experts: int) -> MixtureConfig:
    """Return the configuration of the smaller mixture, at the same scale s."""
    assert config.rank is not None
    counts = {"experts": experts}
    return replace(config, alpha=config.scaling * rank_of_scale(config, experts, config.rank), down=counts, up=counts)


def prune(tensors: dict[str, Tensor], experts: int, use_E: Tensor | None = None) -> tuple[dict[str, Tensor], float]:
    """Return one linear's tensors with its most useful experts, and the share that the others had of what all do."""
    A_ERD, B_EOR = (tensors[f"mixture_{name}"].double() for name in ("A", "B"))
    # |B A|_F^2 = <B^T B, A A^T>.
    size_E = torch.einsum("eor,eos,erd,esd->e", B_EOR, B_EOR, A_ERD, A_ERD).clamp_min(0).sqrt()
    done_E = size_E if use_E is None else size_E * use_E
    kept = done_E.argsort(descending=True, stable=True)[:experts].sort().values
    found = {
        name: tensor[kept].contiguous() if name.removeprefix("mixture_") in _BY_EXPERT else tensor
        for name, tensor in tensors.items()
    }
    return found, 1 - float(done_E[kept].sum() / done_E.sum().clamp_min(1e-300)) if float(done_E.sum()) > 0 else 0.0


__all__ = ["prune", "pruned_config", "refuse_unfit"]
