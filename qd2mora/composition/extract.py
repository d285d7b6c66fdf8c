"""A LoRA out of two checkpoints: the truncated SVD of the difference of every linear, and what it leaves out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qd2mora.base import local_folder
from qd2mora.disk.sealed import verify_where_ours
from qd2mora.disk.tensor_file import is_finite
from qd2mora.errors import InputRefused, NotFinite
from qd2mora.merging.base_weights import BaseWeights
from qd2mora.mixture.low_rank import LowRank
from qd2mora.recipe import Base

EXACT_SIZE = 1024
"""A matrix whose smaller side is at most this is decomposed wholly, a larger one by random projections."""


@dataclass(frozen=True)
class Extracted:
    """The updates, the share of the squared difference that they hold, and changed weights that no LoRA can hold."""

    updates: dict[str, LowRank]
    energy: float
    left_out: list[str]


def extract(tuned: str, base: str, rank: int) -> Extracted:
    """Return the LoRA of `rank` that is nearest to tuned - base on each linear. Raises InputRefused, NotFinite."""
    for name in (tuned, base):
        folder = local_folder(name)
        if folder is None:
            raise InputRefused(f"extract: the files of '{name}' are not on this machine")
        verify_where_ours(folder)
    after, before = (BaseWeights(Base(model=name, quantization="none")) for name in (tuned, base))
    if after.names != before.names or any(after.shape(name) != before.shape(name) for name in after.names):
        raise InputRefused(f"extract: '{tuned}' and '{base}' are models of different shapes")
    linears = {f"{name}.weight": name for name in after.linears}
    updates, kept, whole, left_out = {}, 0.0, 0.0, []
    for name in after.names:
        # One weight of both models at a time: neither is ever whole in memory.
        difference = _whole(after, name) - _whole(before, name)
        if not is_finite(difference):
            raise NotFinite(f"extract: '{name}' of '{tuned}' and '{base}' differ by more than float32 holds")
        size = float(difference.double().square().sum())
        if name not in linears:
            if size:
                left_out.append(name)
        elif size:
            down, up = truncated(difference, rank)
            # s = 1: the scale is in the factors, half in either.
            updates[linears[name]] = LowRank(down, up, 1.0)
            kept, whole = kept + float((up.double() @ down.double()).square().sum()), whole + size
    if not updates:
        raise InputRefused(f"extract: the linears of '{tuned}' and '{base}' are the same")
    return Extracted(updates, kept / whole, left_out)


def truncated(matrix_OD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (r, D) and B (O, r) with B A nearest to the matrix, |a_i| = |b_i|."""
    rank = min(rank, *matrix_OD.shape)
    if min(matrix_OD.shape) <= EXACT_SIZE:
        left, values, right = torch.linalg.svd(matrix_OD, full_matrices=False)
    else:
        # Random projections (Halko et al. 2011), from a seed of their own: the same LoRA every time.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # More directions than asked for and four power iterations part the top from a spectrum that falls slowly.
            left, values, columns = torch.svd_lowrank(matrix_OD, q=rank + 16, niter=4)
        right = columns.T
    root = values[:rank].sqrt()
    return root.unsqueeze(1) * right[:rank], left[:, :rank] * root


def _whole(source: BaseWeights, name: str) -> Tensor:
    return torch.cat([rows for _, rows in source.blocks(name)])


__all__ = ["Extracted", "extract", "truncated"]
