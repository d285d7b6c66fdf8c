"""Least squares in rank space: the K that best explains v = K_t u over the calibration tokens.

K = E[v u^T] (E[u u^T] + ridge I)^-1. Among all updates of the form B K A it is optimal for any B of full column rank,
hence never worse there than mean gates, and exact where K_t is constant. Source: regression merging (RegMean, arXiv
2212.09849) applied to the adapter's own code instead of the layer's input.
"""

import torch
from torch import Tensor

from qd2mora.merging.statistics import Moments

RIDGE = 1e-8
"""Relative to the mean diagonal of E[u u^T]: only keeps directions that never occurred from exploding."""


def mixing(moments: Moments) -> Tensor:
    """Return the static K, (N*r, M*r) float64."""
    ridge = RIDGE * moments.uu.diagonal().mean()
    if ridge == 0:
        return torch.zeros_like(moments.vu)
    regular = moments.uu + ridge * torch.eye(moments.num_down, dtype=torch.float64)
    return torch.linalg.solve(regular, moments.vu.T).T


__all__ = ["RIDGE", "mixing"]
