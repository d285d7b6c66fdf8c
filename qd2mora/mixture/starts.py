"""Starts of a shared expert that look at the weight, or at what flows into it: pure functions of tensors, float32.

Each returns A (r, d_in) and B (d_out, r). Where B A is not zero the caller keeps a frozen copy and subtracts it, so
that the adapted model still starts as its base: y += s (B A - B_0 A_0) x. That differs from PiSSA and OLoRA as
published, which take s B_0 A_0 out of the base weight: the same function and the same gradients of A and B, but the
base stays what it is on disk (4-bit weights are not quantised anew), and the adapter loads on it as any other.
"""

import torch
from torch import Tensor


def pissa(W_OD: Tensor, rank: int, scaling: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the top singular part of W split evenly: s B A = U_r S_r V_r^T (arXiv 2404.02948)."""
    up, values, right = top_singular(W_OD, rank, generator)
    root = (values / scaling).sqrt()
    return root.unsqueeze(-1) * right, up * root


def olora(W_OD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B = Q_r, A = R_r of W = Q R, orthonormal up columns (arXiv 2406.01775)."""
    unit, upper = torch.linalg.qr(W_OD.float())
    return upper[:rank].contiguous(), unit[:, :rank].contiguous()


def residual(
    original_OD: Tensor, kept_OD: Tensor, rank: int, scaling: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the low-rank part of what quantisation lost: s B A ~ W - W_4bit (LoftQ, arXiv 2310.08659, one round)."""
    return pissa(original_OD.float() - kept_OD.float(), rank, scaling, generator)


def top_singular(W_OD: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return U_r (O, r), S_r (r), V_r^T (r, D) by a randomised range finder with four power iterations."""
    W = W_OD.float()
    probe = torch.randn(W.shape[1], min(2 * rank + 8, *W.shape), generator=generator).to(W.device)
    basis = torch.linalg.qr(W @ probe)[0]
    for _ in range(4):
        basis = torch.linalg.qr(W @ torch.linalg.qr(W.T @ basis)[0])[0]
    left, values, right = torch.linalg.svd(basis.T @ W, full_matrices=False)
    return (basis @ left)[:, :rank], values[:rank], right[:rank]


class Activations:
    """Top right singular vectors of all that flows into a linear, kept as a sketch of `rank` + 8 rows (EVA).

    Source: arXiv 2410.07170, with incremental SVD; ranks are not redistributed over linears.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.sketch: Tensor | None = None

    def add(self, x_TD: Tensor) -> None:
        """Take in tokens."""
        rows = x_TD.detach().float()
        stacked = rows if self.sketch is None else torch.cat([self.sketch, rows])
        _, values, right = torch.linalg.svd(stacked, full_matrices=False)
        kept = self.rank + 8
        self.sketch = values[:kept].unsqueeze(-1) * right[:kept]

    def directions(self) -> Tensor:
        """Return the `rank` strongest directions, (rank, d_in), orthonormal; zero rows where fewer were seen."""
        assert self.sketch is not None
        found = torch.linalg.svd(self.sketch, full_matrices=False)[2][: self.rank]
        return torch.cat([found, found.new_zeros(self.rank - len(found), found.shape[1])])


__all__ = ["Activations", "olora", "pissa", "residual", "top_singular"]
