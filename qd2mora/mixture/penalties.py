"""The orthogonality penalty that keeps experts diverse.

L = weight * sum over modules of [ sum_{i<j} |cos(A_i, A_j)| + sum_{i<j} |cos(B_i, B_j)| ], experts flattened, with
cos(P, Q) = <P, Q> / ((|P| + eps)(|Q| + eps)), eps = 1e-6 (D2MoRA; iLearn-Lab/AAAI26-D2MoRA). At B = 0 the value and
the gradient are zero, never NaN: the norm's gradient at zero is taken as zero.

The banks of all modules of one shape are stacked and go through one batched Gram product, so the number of operations
grows with the number of distinct shapes alone, not with experts or modules.

Shapes: L modules of one shape, E experts, X entries of one expert.
"""

from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor

EPS = 1e-6


def pairwise_overlap(banks: Iterable[Tensor]) -> Tensor:
    """Return sum over banks of sum_{i<j} |cos(P_i, P_j)|, a float32 scalar.

    `banks`: tensors (E, ...) of any shapes; banks of one expert count nothing. Accumulates in float32.
    """
    several = sorted((bank for bank in banks if bank.shape[0] > 1), key=_shape)
    if not several:
        return torch.zeros(())
    totals = [_overlap_of_one_shape(torch.stack(list(group))) for _, group in groupby(several, key=_shape)]
    return torch.stack(totals).sum()


def _shape(bank: Tensor) -> tuple[int, ...]:
    return tuple(bank.shape)


def _overlap_of_one_shape(banks: Tensor) -> Tensor:
    flat_LEX = banks.flatten(2).float()
    gram_LEE = flat_LEX @ flat_LEX.mT
    squared_LE = gram_LEE.diagonal(dim1=1, dim2=2)
    # sqrt has an infinite slope at zero; a zero expert must get a zero gradient instead.
    is_zero = squared_LE <= 0
    norm_LE = torch.where(is_zero, torch.zeros_like(squared_LE), torch.where(is_zero, 1.0, squared_LE).sqrt()) + EPS
    cos_LEE = gram_LEE / (norm_LE.unsqueeze(1) * norm_LE.unsqueeze(2))
    return cos_LEE.abs().triu(1).sum()


__all__ = ["EPS", "pairwise_overlap"]
