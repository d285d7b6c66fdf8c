"""The mixture in rank space, as pure functions of tensors.

Every method here is y_t = W x_t + b + s * B K_t A x_t. It is computed K first: one product u = A x, a step in rank
space v = K_t u, one product B v, so that no tensor of tokens x d_out is ever formed per expert. Gates are softmaxes
in float32, and so is everything in rank space; the two large products run in the dtype of x. `fused` joins these into
one autograd function.

Shapes: ... any leading axes (batch, tokens), D d_in, O d_out, R rank of one expert, M down experts, N up experts,
E paired experts, P, Q rank of the core.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def stack_rows(A_MRD: Tensor) -> Tensor:
    """Return the down experts as one matrix (M*R, D); a view."""
    return A_MRD.flatten(0, 1)


def stack_columns(B_NOR: Tensor) -> Tensor:
    """Return the up experts as one matrix (O, N*R); expert j owns columns j*R to (j+1)*R."""
    return B_NOR.permute(1, 0, 2).flatten(1)


def unstack_columns(B_OK: Tensor, shape: torch.Size) -> Tensor:
    """Return the inverse of stack_columns: (O, N*R) to (N, O, R)."""
    num_up, d_out, rank = shape
    return B_OK.view(d_out, num_up, rank).permute(1, 0, 2).contiguous()


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or float64 where it is: what rank space is computed in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def unlowered(tensor: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off: it would run the routers' products, and on a CPU their softmax, in 16 bits."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


@dataclass(frozen=True)
class RankStep:
    """The step from u_ext = [A; routers that read x] x to v = K_t u, for one pairing and one set of gates.

    `num_down` experts of `rank` come first in u_ext, then the logits of the down gate where there is one, then those of
    an up gate that reads x.
    """

    num_down: int
    num_up: int
    rank: int
    is_tied: bool = False
    gates_down: bool = False
    up_reads: Literal["x", "z"] | None = None

    def mix(
        self, u_ext: Tensor, router_z: Tensor | None = None, core: Tensor | None = None, gate_pair: Tensor | None = None
    ) -> Tensor:
        """Return v (..., N*R) of u_ext (..., features), both in at least float32."""
        u = u_ext[..., : self.num_down * self.rank].unflatten(-1, (self.num_down, self.rank))
        if self.is_tied:
            assert gate_pair is not None
            return pair(u, gate_pair)
        _, gate_up, z = self.chain(u_ext, router_z, core)
        return spread_up(z, gate_up)

    def chain(
        self, u_ext: Tensor, router_z: Tensor | None, core: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Return both gates and the mixed code z between the banks."""
        with unlowered(u_ext):
            return self._chain(u_ext, router_z, core)

    def _chain(
        self, u_ext: Tensor, router_z: Tensor | None, core: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        width = self.num_down * self.rank
        u = u_ext[..., :width].unflatten(-1, (self.num_down, self.rank))
        logits = u_ext[..., width:]
        gate_down = logits[..., : self.num_down].softmax(-1) if self.gates_down else None
        z = apply_core(mix_down(u, gate_down), core)
        gate_up = None
        if self.up_reads == "x":
            gate_up = logits[..., -self.num_up :].softmax(-1)
        elif self.up_reads == "z":
            assert router_z is not None
            gate_up = (z @ router_z.to(z.dtype).T).softmax(-1)
        return gate_down, gate_up, z


def features(x: Tensor, A_MRD: Tensor, router_x: Tensor | None = None) -> Tensor:
    """Return u_ext = [A; routers that read x] x, (..., M*R + router rows), one product in the dtype of x."""
    rows = stack_rows(A_MRD).to(x.dtype)
    if router_x is not None:
        rows = torch.cat([rows, router_x.to(x.dtype)])
    return F.linear(x, rows)


def mix_down(u: Tensor, gate_down: Tensor | None) -> Tensor:
    """Return z = sum_i gate_i u_i, (..., R); with one ungated expert, that expert's u."""
    if gate_down is None:
        return u.squeeze(-2)
    return (gate_down.unsqueeze(-1) * u).sum(-2)


def apply_core(z: Tensor, core_PQ: Tensor | None) -> Tensor:
    """Return C z in float32, or z where there is no core."""
    return z if core_PQ is None else F.linear(z, core_PQ.to(z.dtype))


def spread_up(z: Tensor, gate_up: Tensor | None) -> Tensor:
    """Return v with block j = gate_j z, (..., N*R)."""
    if gate_up is None:
        return z
    return (gate_up.unsqueeze(-1) * z.unsqueeze(-2)).flatten(-2)


def pair(u: Tensor, gate_pair: Tensor) -> Tensor:
    """Return v of paired experts: block e = gate_e u_e, (..., E*R). `gate_pair` broadcasts over tokens."""
    return (gate_pair.unsqueeze(-1) * u).flatten(-2)


def up_product(v: Tensor, B_NOR: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return s * B v, (..., O), one product in `dtype`."""
    return F.linear((v * scaling).to(dtype), stack_columns(B_NOR).to(dtype))


__all__ = [
    "RankStep",
    "apply_core",
    "features",
    "mix_down",
    "pair",
    "spread_up",
    "stack_columns",
    "stack_rows",
    "unlowered",
    "unstack_columns",
    "up_product",
    "wide",
]
