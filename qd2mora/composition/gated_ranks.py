"""Fewer ranks where ranks are gated: those that do most in each linear, with their bits.

What a rank does is the size of its update, |b_i| |a_i|, times how much it is used. Tokens choose among what is left, so
that one which chose a rank that is gone takes another in its place.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from qd2mora.composition.experts import Linears, Pruned
from qd2mora.errors import InputRefused
from qd2mora.mixture import MixtureConfig


def pruned_ranks(
    config: MixtureConfig, linears: Linears, number: int, shares: Callable[[str], Tensor | None]
) -> Pruned:
    """Return the adapter with so many ranks; `shares` of a linear (R,), or all alike. Raises InputRefused."""
    of, used = config.rank or 1, config.routers["rank"].top_k or 1
    if not used <= number <= of:
        raise InputRefused(
            f"--experts: {number} will not do: from the {used} ranks that a token uses to the {of} there are"
        )
    plain = replace(config, rank=number, alpha=1.0)
    changed: Linears = {}
    lost = []
    for name, tensors in linears.items():
        down_RD, up_OR = tensors["mixture_A"][0].double(), tensors["mixture_B"][0].double()
        done_R = down_RD.norm(dim=1) * up_OR.norm(dim=0)
        use_R = shares(name)
        if use_R is not None:
            done_R = done_R * use_R
        best = done_R.argsort(descending=True, stable=True)[:number].sort().values
        total = float(done_R.sum())
        lost.append(max(0.0, 1 - float(done_R[best].sum()) / total) if total > 0 else 0.0)
        changed[name] = {key: _of_ranks(key, tensor, best) for key, tensor in tensors.items()}
    return Pruned(replace(plain, alpha=config.scaling / plain.scaling), changed, lost)


def _of_ranks(key: str, tensor: Tensor, kept: Tensor) -> Tensor:
    """Return what of a tensor belongs to some ranks."""
    axes = {"mixture_A": 1, "mixture_B": 2}
    axis = axes.get(key, 0 if key.endswith("_rank") else None)
    return tensor if axis is None else tensor.index_select(axis, kept).contiguous()


__all__ = ["pruned_ranks"]
