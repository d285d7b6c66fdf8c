"""Least squares in rank space: the K that best explains v = K_t A x over the calibration tokens, in closed form.

K = E[v u^T] (E[u u^T] + ridge I)^-1 with u = [A; R] x, R the rows of the routers that read x: they are there anyway,
read the same x, and say where the gates lean. Answers count as much as prompts (`statistics.balanced`). Among all
updates of the form B K [A; R] it is optimal for any B of full column rank, hence never worse there than mean gates or
than u = A x alone, and exact where K_t is constant. The rank stays that of B or of [A; R]. Source: regression merging
(RegMean, arXiv 2212.09849) applied to the adapter's own code instead of the layer's input.
"""

import torch
from torch import Tensor

from qd2mora.merging.statistics import Moments

RIDGE = 1e-8
"""Relative to E[u u^T]'s own diagonal: only keeps directions that never occurred from exploding."""


def mixing(moments: Moments, *, with_routers: bool = True) -> Tensor:
    """Return the static K, (P, Q + E) or, without the routers' rows, (P, Q), float64."""
    width = len(moments.uu) if with_routers else moments.num_core
    uu, vu = moments.uu[:width, :width], moments.vu[:, :width]
    # Nothing was ever seen here: every K explains that, and none is divided by zero.
    if not uu.any():
        return torch.zeros_like(vu)
    # Routers and experts differ in size by orders of magnitude: features of unit size make one ridge right for both.
    size = uu.diagonal().sqrt().clamp_min(float(uu.diagonal().max()) ** 0.5 * 1e-12)
    regular = uu / torch.outer(size, size) + RIDGE * torch.eye(width, dtype=torch.float64)
    # The solution for u / size is K diag(size), so that it is divided by size once more.
    # K uu = vu, turned over for a solver whose unknowns are columns (uu is symmetric). In float64: normal equations
    # square the condition of u, and float32 would have no digit left.
    return torch.linalg.solve(regular, (vu / size).T).T / size


__all__ = ["mixing"]
