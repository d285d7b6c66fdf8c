"""Penalties that read weights alone, once an optimiser step; first the one that keeps D2MoRA's experts diverse.

L = weight * sum over modules of [ sum_{i<j} |cos(A_i, A_j)| + sum_{i<j} |cos(B_i, B_j)| ], experts flattened, with
cos(P, Q) = <P, Q> / ((|P| + eps)(|Q| + eps)), eps = 1e-6 (D2MoRA; iLearn-Lab/AAAI26-D2MoRA). At B = 0 the value and
the gradient are zero, never NaN: the norm's gradient at zero is taken as zero.

Banks of one shape are stacked, `AT_ONCE` entries or one bank at a time, and go through one batched Gram product: few
operations, which grow with neither experts nor small modules, and memory for a few stacks whatever the model.

Shapes: L modules of one shape, E experts, X entries of one expert.
"""

from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor

EPS = 1e-6
AT_ONCE = 1 << 23
"""Entries that are stacked at once, 32 MiB in float32."""


def pairwise_overlap(banks: Iterable[Tensor]) -> Tensor:
    """Return sum over banks of sum_{i<j} |cos(P_i, P_j)|, a float32 scalar.

    `banks`: tensors (E, ...) of any shapes; banks of one expert, or of ranks that differ, count nothing.
    Accumulates in float32.
    """
    # A sum over pairs, banks and modules as in the authors' code, which the weight 1e-4 belongs to; a mean would need
    # another.
    totals = [_overlap_of_one_shape(torch.stack(group)) for group in groups_of(banks)]
    return torch.stack(totals).sum() if totals else torch.zeros(())


def groups_of(banks: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return the banks that count, those of one shape together, at most `AT_ONCE` entries or one bank in a group."""
    # Sorted by shape, so that all modules of one kind (q_proj of every layer) stack.
    several = sorted((bank for bank in banks if bank.dim() == 3 and bank.shape[0] > 1), key=_shape)
    groups = []
    for _, group in groupby(several, key=_shape):
        alike = list(group)
        number = max(1, AT_ONCE // alike[0].numel())
        groups += [alike[start : start + number] for start in range(0, len(alike), number)]
    return groups


def _shape(bank: Tensor) -> tuple[int, ...]:
    return tuple(bank.shape)


def _overlap_of_one_shape(banks: Tensor) -> Tensor:
    flat_LEX = banks.flatten(2).float()
    gram_LEE = flat_LEX @ flat_LEX.mT
    squared_LE = gram_LEE.diagonal(dim1=1, dim2=2)
    # sqrt has an infinite slope at zero; a zero expert must get a zero gradient instead.
    is_zero = squared_LE <= 0
    norm_LE = torch.where(is_zero, torch.zeros_like(squared_LE), torch.where(is_zero, 1.0, squared_LE).sqrt()) + EPS
    # eps outside the root, as in the authors' code.
    cos_LEE = gram_LEE / (norm_LE.unsqueeze(1) * norm_LE.unsqueeze(2))
    return cos_LEE.abs().triu(1).sum()


def subspace_overlap(banks: Iterable[Tensor], axis: int) -> Tensor:
    """Return sum over banks of sum_{i<j} |P_i P_j^T|_F^2 / (|P_i|_F^2 |P_j|_F^2), a float32 scalar.

    `axis` is the rank's place in an expert: 0 for rows of A (R, D), 1 for columns of B (O, R). Unlike the flattened
    cosine it does not change when an expert's ranks are rotated among themselves, so experts that span the same
    directions cannot score zero. Ours, not published. One product for all pairs of a bank.
    """
    total = torch.zeros(())
    for bank in banks:
        if bank.dim() == 3 and bank.shape[0] > 1:
            # Ranks first, whichever side they stand on: A's rows and B's columns are compared alike.
            rows_ERX = bank.movedim(1 + axis, 1).float()
            # |P_i P_j^T|_F^2 for all pairs: blocks of one Gram matrix over all ranks of all experts.
            num, rank, _ = rows_ERX.shape
            stacked = rows_ERX.flatten(0, 1)
            gram = (stacked @ stacked.T).view(num, rank, num, rank).square().sum((1, 3))
            norm = rows_ERX.square().sum((1, 2)) + EPS
            total = total.to(gram.device) + (gram / norm.unsqueeze(0) / norm.unsqueeze(1)).triu(1).sum()
    return total


def task_contrast(tables: Iterable[Tensor], temperature: float = 0.1) -> Tensor:
    """Return the mean InfoNCE loss that pushes the embeddings of tasks apart, a float32 scalar (EPT, reconstruction).

    `tables`: (tasks + 1, width); the last row stands for no task and is left out.
    """
    losses = []
    for table in tables:
        # Each task is its own positive: what is left to learn is to be unlike the others.
        unit = torch.nn.functional.normalize(table[:-1].float(), dim=-1)
        likeness = unit @ unit.T / temperature
        losses.append((likeness.logsumexp(-1) - likeness.diagonal()).mean())
    return torch.stack(losses).mean() if losses else torch.zeros(())


WEIGHT_PENALTIES = ("diversity_cos", "diversity_subspace", "task_contrast")

__all__ = ["AT_ONCE", "EPS", "WEIGHT_PENALTIES", "groups_of", "pairwise_overlap", "subspace_overlap", "task_contrast"]
