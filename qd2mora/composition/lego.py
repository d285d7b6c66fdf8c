"""LoRA-LEGO (arXiv 2409.16167): the ranks of several LoRAs are clustered, each cluster becomes one rank.

A unit is one rank, (a_j, b_j), of size d_in + d_out. The same function has many units, (b c)(a / c), so units are first
brought to |a| = |b| and a sign. A cluster of n units stands for their sum: n times the centroid's product, the centroid
stretched to its members' mean norm, which averaging shortens (a reconstruction: the paper's two weights are not given
in closed form). Lossless where members of a cluster are equal, hence for k copies of one LoRA and at the full rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qd2mora.composition import cat
from qd2mora.disk.tensor_file import is_finite
from qd2mora.errors import NotFinite
from qd2mora.mixture.low_rank import LowRank
from qd2mora.mixture.trained_loras import TrainedLora

ROUNDS = 100


def compose(loras: Sequence[TrainedLora], weights: Sequence[float], rank: int, seed: int = 0) -> dict[str, LowRank]:
    """Return LoRAs of at most `rank`, each near the weighted sum."""
    return {name: clustered(each, rank, seed) for name, each in cat.compose(loras, weights).items()}


def clustered(update: LowRank, rank: int, seed: int = 0) -> LowRank:
    """Return an update of at most `rank` whose ranks stand for clusters of the given ones. Raises NotFinite."""
    a_RD, b_RO = _canonical(update.down.float(), update.scaling * update.up.float().T)
    if not (is_finite(a_RD) and is_finite(b_RO)):
        raise NotFinite("lego: the weighted LoRAs are not finite: their numbers, or --weights, are too large")
    num = min(rank, len(a_RD))
    if num == len(a_RD):
        return LowRank(a_RD, b_RO.T.contiguous(), 1.0)
    # One unit is both halves: ranks that read alike and write differently are not alike.
    units = torch.cat([a_RD, b_RO], 1)
    owner_R = kmeans(units, num, torch.Generator().manual_seed(seed))
    downs, ups = [], []
    for cluster in owner_R.unique():
        members = owner_R == cluster
        a, b = _stretched(a_RD[members]), _stretched(b_RO[members])
        downs.append(a)
        # n equal ranks give n b a^T; the count goes to one side alone.
        ups.append(int(members.sum()) * b)
    return LowRank(torch.stack(downs), torch.stack(ups, 1), 1.0)


def kmeans(points_ND: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Return each point's cluster (N,), by Lloyd's rounds from starts that are far apart (k-means++)."""
    points = points_ND.double()
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    # k-means++: a start far from those there are is likelier, so that Lloyd's rounds seldom end in a poor optimum.
    while len(chosen) < num:
        nearest = torch.cdist(points, points[chosen]).amin(1).square()
        if float(nearest.sum()) == 0:
            break
        chosen.append(int(torch.multinomial(nearest, 1, generator=generator)))
    centers = points[chosen]
    owner = torch.cdist(points, centers).argmin(1)
    for _ in range(ROUNDS):
        # A cluster that lost its last member stays where it was: it may win some back.
        centers = torch.stack(
            [points[owner == each].mean(0) if (owner == each).any() else centers[each] for each in range(len(centers))]
        )
        moved = torch.cdist(points, centers).argmin(1)
        if moved.equal(owner):
            break
        owner = moved
    return owner


def _canonical(a_RD: Tensor, b_RO: Tensor) -> tuple[Tensor, Tensor]:
    """Bring units to |a| = |b|, the largest entry of a positive; units that are nothing become zeros."""
    norm_a, norm_b = a_RD.norm(dim=1), b_RO.norm(dim=1)
    # |a| = |b| = sqrt(|a| |b|) keeps the product b a^T.
    size = (norm_a * norm_b).sqrt()
    # (-b)(-a) is the same function, so that a sign is chosen by the largest entry of a.
    turn = a_RD.gather(1, a_RD.abs().argmax(1, keepdim=True)).squeeze(1).sign()
    a = a_RD * (turn * size / norm_a.clamp_min(torch.finfo(a_RD.dtype).tiny)).unsqueeze(1)
    b = b_RO * (turn * size / norm_b.clamp_min(torch.finfo(a_RD.dtype).tiny)).unsqueeze(1)
    return a, b


def _stretched(members: Tensor) -> Tensor:
    center = members.mean(0)
    norm = center.norm()
    if norm == 0:
        return center
    return center * (members.norm(dim=1).mean() / norm)


__all__ = ["clustered", "compose"]
