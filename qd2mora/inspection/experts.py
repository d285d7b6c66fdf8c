"""How alike the experts of one bank are: cosines, angles between their subspaces, effective rank, a picture in 2-D.

All of it comes from one Gram matrix of the bank's ranks, G = P P^T in float64, so that no tensor of the size of the
bank is made but for its chunks. Experts i, j with Gram blocks G_ij: <P_i, P_j> = tr G_ij over equal ranks, and the
cosines of the principal angles between their row spaces are the singular values of W_i G_ij W_j^T, W_i = G_ii^(-1/2)
on the directions that are there. Up experts enter transposed: their columns span what they can write.

The 2-D picture is a PCA of experts as unit vectors, of all layers and one kind of linear together.

Shapes: Q all ranks of a bank, X the long side, E experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 14
"""Columns of a bank that are float64 at once."""
SMALLEST = 1e-10
"""Eigenvalues of a Gram matrix below this share of the largest are no directions: float32 weights hold no more."""


@dataclass(frozen=True)
class BankMeasures:
    """One bank: E x E cosines (absolute) and overlaps (mean squared cosine of the principal angles), within 0 and 1.

    angle: the mean principal angle between two experts in degrees; effective_rank: exp of the entropy of the whole
    bank's squared singular values. A mean over no pair, or an angle of experts that are zero, is None.
    """

    norms: list[float]
    cosines: list[list[float]]
    overlaps: list[list[float]]
    mean_cosine: float | None
    mean_overlap: float | None
    mean_angle: float | None
    effective_rank: float


def gram(rows_QX: Tensor) -> Tensor:
    """Return P P^T (Q, Q) float64 on the CPU."""
    # float64: cosines of nearly equal experts differ in digits that float32 sums over thousands of columns lose.
    total = torch.zeros(rows_QX.shape[0], rows_QX.shape[0], dtype=torch.float64, device=rows_QX.device)
    for part in rows_QX.detach().split(CHUNK, 1):
        wide = part.double()
        total += wide @ wide.T
    # Q x Q is small: what is decomposed from here on costs little on the CPU, and GPUs are slow in float64.
    return total.cpu()


def measure_bank(rows_QX: Tensor, ranks: Sequence[int]) -> BankMeasures:
    """Return the measures of a bank whose ranks stand one below the other, expert after expert."""
    whole = gram(rows_QX)
    blocks = [list(part.split(list(ranks), 1)) for part in whole.split(list(ranks), 0)]
    # The trace of a block is |P_i|^2; rounding may leave that of a zero expert a hair below zero.
    norms = [math.sqrt(max(0.0, float(blocks[place][place].trace()))) for place in range(len(ranks))]
    roots = [_whitening(blocks[place][place]) for place in range(len(ranks))]
    cosines, overlaps, angles = torch.eye(len(ranks)), torch.eye(len(ranks)), []
    for i in range(len(ranks)):
        for j in range(i):
            cosines[i, j] = cosines[j, i] = _cosine(blocks[i][j], norms[i] * norms[j])
            # Cosines of the principal angles between two row spaces; rounding may take one a hair above 1.
            values = torch.linalg.svdvals(roots[i] @ blocks[i][j] @ roots[j].T).clamp(0, 1)
            num_angles = min(len(roots[i]), len(roots[j]))
            # An expert that is zero spans nothing, and has no angle to anything.
            if num_angles:
                overlaps[i, j] = overlaps[j, i] = float(values.square().sum()) / num_angles
                angles.append(float(values[:num_angles].acos().rad2deg().mean()))
    return BankMeasures(
        norms=norms,
        cosines=cosines.tolist(),
        overlaps=overlaps.tolist(),
        mean_cosine=_mean_of_pairs(cosines),
        mean_overlap=_mean_of_pairs(overlaps) if angles else None,
        mean_angle=sum(angles) / len(angles) if angles else None,
        effective_rank=effective_rank(whole),
    )


def effective_rank(gram_QQ: Tensor) -> float:
    """Return exp of the entropy of a Gram matrix's eigenvalues as shares; 0 where all are zero."""
    values = torch.linalg.eigvalsh(gram_QQ).clamp_min(0)
    if float(values.sum()) == 0:
        return 0.0
    return math.exp(float(torch.special.entr(values / values.sum()).sum()))


def project(experts: Sequence[Tensor]) -> tuple[list[tuple[float, float] | None], list[float]]:
    """Return each expert's place on the two main axes of all, and the share of the variance that each axis holds.

    Experts are flattened and scaled to length one; one that is zero has no place. A place's sign is free, so that the
    largest coordinate of an axis is made positive.
    """
    flat = [expert.detach().flatten() for expert in experts]
    there = [place for place, expert in enumerate(flat) if bool(expert.any())]
    if len(there) < 2:
        return [None] * len(flat), []
    # PCA by the Gram matrix of experts: their number is small, their length is millions.
    whole = gram(torch.stack([flat[place].float() for place in there]))
    scale = whole.diagonal().rsqrt()
    whole = whole * scale.unsqueeze(0) * scale.unsqueeze(1)
    # The Gram matrix of centred rows, without the rows: double centring.
    centered = whole - whole.mean(0, keepdim=True) - whole.mean(1, keepdim=True) + whole.mean()
    values, vectors = torch.linalg.eigh(centered)
    # eigh ends with the largest.
    values, vectors = values.flip(0)[:2].clamp_min(0), vectors.flip(1)[:, :2]
    places = vectors * values.sqrt()
    # An eigenvector's sign is free: without a rule two runs of one adapter would draw mirrored pictures.
    largest = places.gather(0, places.abs().argmax(0, keepdim=True))
    places = places * torch.where(largest < 0, -1.0, 1.0)
    total = float(centered.trace())
    found: list[tuple[float, float] | None] = [None] * len(flat)
    for place, (x, y) in zip(there, places.tolist(), strict=True):
        found[place] = (x, y)
    return found, [float(value) / total if total > 0 else 0.0 for value in values]


def _whitening(block: Tensor) -> Tensor:
    """Return W with W G W^T the identity on the directions that an expert has, (directions, ranks)."""
    if not len(block):
        return block  # the base as an expert, of rank 0
    values, vectors = torch.linalg.eigh(block)
    # A direction within rounding of zero would be blown up by 1 / sqrt to unit length.
    is_there = values > SMALLEST * values.max().clamp_min(torch.finfo(values.dtype).tiny)
    return values[is_there].rsqrt().unsqueeze(1) * vectors[:, is_there].T


def _cosine(block: Tensor, scale: float) -> float:
    """Return |<P_i, P_j>| / scale; experts of different ranks share no places to compare, and count 0."""
    if scale == 0 or block.shape[0] != block.shape[1]:
        return 0.0
    return abs(float(block.trace())) / scale


def _mean_of_pairs(values: Tensor) -> float | None:
    num = len(values)
    if num < 2:
        return None
    return float(values.tril(-1).sum()) / (num * (num - 1) / 2)


__all__ = ["BankMeasures", "effective_rank", "gram", "measure_bank", "project"]
