"""How tensors start. At step 0 the adapted model is the base for any router, because routed up experts are zero (or,
where one seed is unfolded by kernels, the kernels).

Initialisers that make B A differ from zero go to the shared expert alone, and its start is subtracted again (`start`),
so that even there nothing changes at step 0, on any base, 4-bit included: y += s (B A - B_0 A_0) x. That differs from
PiSSA and OLoRA as published, which take s B_0 A_0 out of the base weight: the same function and the same gradients of A
and B, but the base stays what it is on disk (4-bit weights are not quantised anew), and the adapter loads on it as any
other. The one exception is LoftQ's: it starts at what 4-bit quantisation lost, so the adapted model starts nearer to
the 16-bit base than its 4-bit base does.

Those that look at the weight, or at what flows into it, are pure functions of tensors in float32, and return A (r,
d_in) and B (d_out, r). Names of initialisers are the recipe's (`recipe.adapter`).
"""

import math

import torch
from torch import Tensor, nn

from qd2mora.mixture.config import MixtureConfig
from qd2mora.mixture.spec import LinearSpec
from qd2mora.recipe.adapter import DownInit


def initial_tensor(name: str, shape: tuple[int, ...], config: MixtureConfig, spec: LinearSpec) -> Tensor:
    """Return the start of one tensor, from torch's generator; B zero, the rest as each method's code does."""
    row, tensor = config.row, torch.empty(shape)
    if name == "mixture_B" and row.core == "kron":
        return nn.init.normal_(tensor, std=row.init_std or 1 / shape[-1])  # the kernels are what is zero (EPT)
    if name in ("mixture_B", "mixture_shared_B", "mixture_start_A", "mixture_start_B", "mixture_base_scale"):
        return tensor.zero_()
    if name.startswith(("mixture_select_bias", "mixture_bias")):
        return tensor.zero_()
    if name == "mixture_A":
        return initial_down(tensor, config.init or "kaiming", row.init_std or 1 / shape[-2], spec)
    if name == "mixture_core":
        return _initial_core(tensor, row.core)
    if name == "mixture_task_embedding":
        # As nn.Embedding starts.
        return nn.init.normal_(tensor)
    if name.startswith("mixture_logits") and len(shape) == 2:
        # Each mark starts at the expert of its own number, more than at the others.
        return tensor.copy_(2 * torch.eye(shape[0], device=tensor.device))
    if name.startswith("mixture_logits"):
        # CAT's weights start at random (its code: randn, then softmax), ScaleZero's scales 1 + 0.2 tanh(0) at 1.
        return tensor.zero_() if row.base_scale else tensor.normal_()
    if name.startswith("mixture_router") and row.router_std is not None:
        return nn.init.normal_(tensor, std=row.router_std)
    return kaiming(tensor)


def initial_down(tensor: Tensor, kind: DownInit, std: float, spec: LinearSpec) -> Tensor:
    """Start down experts: kaiming, gaussian with `std`, orthogonal rows over the whole bank, or frozen sparse rows."""
    # Tensors on the meta device, which the planner builds, have no values to make orthogonal or sparse.
    match kind:
        case "gaussian":
            return nn.init.normal_(tensor, std=std)
        case "orthogonal" if not tensor.is_meta:
            # Rows of all experts orthogonal to each other, at Kaiming's size: experts start as different as can be.
            rows = nn.init.orthogonal_(tensor.flatten(0, -2))
            # Rows of U(-1/sqrt d, 1/sqrt d) have a mean square length of d / (3 d).
            return rows.mul_(1 / math.sqrt(3)).view(tensor.shape)
        case "sparse" if not tensor.is_meta:
            return sparse(tensor, _active_share(spec))
    return kaiming(tensor)


def singular_slices(W_OD: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Return the `number` strongest right singular vectors of W as rows (number, D), at Kaiming's size.

    Cut into experts they are orthogonal to each other, and each reads its own part of what the weight reads.
    """
    return top_singular(W_OD, number, generator)[2] / math.sqrt(3)


def neuron_slices(W_OD: Tensor, number: int, *, reads_neurons: bool) -> list[Tensor]:
    """Return W cut into `number` parts by a block's inner neurons, each (O, D) and zero at the others'.

    Inner neurons are the outputs of what makes them (q, k, v, gate, up), and the inputs of what reads them (o, down):
    so that expert e is the same part of an MLP in all of its linears (after Dynamic-DINO's split of a trained MLP,
    arXiv 2507.17436, which makes its experts of the parts themselves).
    """
    axis = int(reads_neurons)
    owner = torch.arange(W_OD.shape[axis], device=W_OD.device) * number // W_OD.shape[axis]
    return [W_OD * (owner == part).unsqueeze(1 - axis) for part in range(number)]


def kaiming(tensor: Tensor) -> Tensor:
    """Kaiming uniform with a = sqrt(5) over the last axis: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    # The gain sqrt(2 / (1 + 5)) times sqrt(3 / fan_in): what nn.Linear starts with.
    bound = 1 / math.sqrt(tensor.shape[-1])
    return nn.init.uniform_(tensor, -bound, bound)


def sparse(tensor: Tensor, share: float) -> Tensor:
    """Give each row floor(share * d) entries ~ N(0, 1/r^2) at random places, the rest zero (FlyLoRA; r its rank)."""
    rank, d_in = tensor.shape[-2], tensor.shape[-1]
    # Drawn place by place for each row, without replacement: the k largest of d uniform numbers.
    number = max(1, int(share * d_in))
    places = torch.rand(tensor.shape).topk(number, -1).indices
    return tensor.zero_().scatter_(-1, places, torch.randn(*tensor.shape[:-1], number) / rank)


def _active_share(spec: LinearSpec) -> float:
    gate = spec.gate("rank")
    if gate is None or gate.top_k is None:
        return 1.0
    return gate.top_k / spec.step.width_down


def _initial_core(tensor: Tensor, kind: str) -> Tensor:
    if kind in ("residual", "residual_diagonal", "kron"):
        return tensor.zero_()  # plain LoRA, or for kernels the base, at the start: routing adds to it what it learns
    if kind == "diagonal":
        # Near one, so that a bank of modulations starts near plain LoRA and its experts differ.
        return nn.init.normal_(tensor, mean=1.0, std=0.1)
    return kaiming(tensor)


def pissa(W_OD: Tensor, rank: int, scaling: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the top singular part of W split evenly: s B A = U_r S_r V_r^T (arXiv 2404.02948)."""
    up, values, right = top_singular(W_OD, rank, generator)
    # Half of each singular value on either side, as published.
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
    # More directions than wanted make the range finder sure (Halko, Martinsson, Tropp 2011).
    probe = torch.randn(W.shape[1], min(2 * rank + 8, *W.shape), generator=generator).to(W.device)
    basis = torch.linalg.qr(W @ probe)[0]
    # Powers of W W^T part the top from the rest, and orthonormalising in between keeps small directions alive.
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
        if self.sketch is not None:
            rows = torch.cat([self.sketch, rows])
        _, values, right = torch.linalg.svd(rows, full_matrices=False)
        # A few directions more than wanted: what is weak now may still grow.
        kept = self.rank + 8
        self.sketch = values[:kept].unsqueeze(-1) * right[:kept]

    def directions(self) -> Tensor:
        """Return the `rank` strongest directions, (rank, d_in), orthonormal; zero rows where fewer were seen."""
        assert self.sketch is not None
        found = torch.linalg.svd(self.sketch, full_matrices=False)[2][: self.rank]
        return torch.cat([found, found.new_zeros(self.rank - len(found), found.shape[1])])


__all__ = [
    "Activations",
    "initial_tensor",
    "kaiming",
    "neuron_slices",
    "olora",
    "pissa",
    "residual",
    "singular_slices",
    "sparse",
]
