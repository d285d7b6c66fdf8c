"""The mixture in rank space, as pure functions of tensors.

Every method here is y_t = W x_t + b + s * B K_t A x_t. It is computed K first: one product u = [A; routers] x, a step
in rank space v = K_t u, one product B v, so that no tensor of tokens x d_out is ever formed per expert, and a top-k is
a mask on v. Gates and everything else in rank space are float32 (float64 where x is); the two large products run in the
dtype of x. `fused` joins these into one autograd function.

Shapes: ... leading axes (rows, tokens), D d_in, O d_out, R rank of one expert, M down experts, N up experts, E paired
experts or cores, Q all ranks of the down bank, P all ranks of the up bank, S rank of the shared expert.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from qd2mora.mixture.draws import Draws
from qd2mora.mixture.method import Gate
from qd2mora.mixture.routers import Gating, decide, noisy

Small = Mapping[str, Tensor]
"""What the step reads beside u, by name: `router_up` (N, R), `core`, `logits_down` (..., E) given from outside, ..."""

_PURPOSE = {"down": 1001, "up": 1002, "core": 1003, "rank": 1004}


def stack_rows(A_MRD: Tensor) -> Tensor:
    """Return the down experts as one matrix (Q, D): a view of (M, R, D), or (Q, D) itself where ranks differ."""
    return A_MRD.flatten(0, 1) if A_MRD.dim() == 3 else A_MRD


def stack_columns(B_NOR: Tensor) -> Tensor:
    """Return the up experts as one matrix (O, P), expert after expert; (O, P) itself where ranks differ."""
    return B_NOR.permute(1, 0, 2).flatten(1) if B_NOR.dim() == 3 else B_NOR


def unstack_columns(B_OP: Tensor, shape: torch.Size) -> Tensor:
    """Return the inverse of stack_columns."""
    if len(shape) == 2:
        return B_OP
    num_up, d_out, rank = shape
    return B_OP.view(d_out, num_up, rank).permute(1, 0, 2).contiguous()


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or float64 where it is: what rank space is computed in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def unlowered(tensor: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off: it would run the routers' products, and on a CPU their softmax, in 16 bits."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


@dataclass(frozen=True)
class RankStep:
    """The step from u_ext = [A; shared; routers that read x] x to v = K_t u, for one linear.

    u_ext holds the Q ranks of the down bank, the S ranks of the shared expert, then the rows of the routers that read
    x, in the order of `router_rows`. v holds the P ranks of the up bank, then the shared expert's, which no gate
    touches. `gates` leaves out those that are constant.
    """

    ranks_down: tuple[int, ...]
    ranks_up: tuple[int, ...]
    pairing: Literal["chain", "tied"] = "chain"
    core: Literal["none", "dense", "bank", "diagonal", "kron"] = "none"
    gates: tuple[tuple[str, Gate], ...] = ()
    router_rows: tuple[tuple[str, int], ...] = ()
    scales: tuple[int, ...] = ()
    shared: int = 0
    shared_scaling: float = 1.0
    places: dict[str, slice] = field(init=False, repr=False, hash=False, compare=False)

    def __post_init__(self) -> None:
        places, start = {}, self.width_down + self.shared
        for role, rows in self.router_rows:
            places[role] = slice(start, start + rows)
            start += rows
        object.__setattr__(self, "places", places)

    @property
    def width_down(self) -> int:
        """Q, the ranks of the down bank."""
        return sum(self.ranks_down)

    @property
    def width_up(self) -> int:
        """P, the ranks of the up bank."""
        return sum(self.ranks_up)

    @property
    def features(self) -> int:
        """Entries of u_ext a token."""
        return self.width_down + self.shared + sum(rows for _, rows in self.router_rows)

    def mix(self, u_ext: Tensor, small: Small, draws: Draws | None = None) -> Tensor:
        """Return v (..., P + S) of u_ext (..., features), both in at least float32."""
        return self.route(u_ext, small, draws)[0]

    def route(self, u_ext: Tensor, small: Small, draws: Draws | None = None) -> tuple[Tensor, dict[str, Gating]]:
        """Return v and what each router decided. `draws` brings noise, in training only."""
        with unlowered(u_ext):
            u = u_ext[..., : self.width_down]
            gatings: dict[str, Gating] = {}
            if self.pairing == "tied":
                v = self._tied(u, u_ext, small, draws, gatings)
            else:
                v = self._chain(u, u_ext, small, draws, gatings)
            if self.shared:
                kept = u_ext[..., self.width_down : self.width_down + self.shared]
                v = torch.cat([v, self.shared_scaling * kept], -1)
            return v, gatings

    def mixing(self, u_ext: Tensor, small: Small) -> Tensor:
        """Return K_t of every token, (..., P + S, Q + S): the step's gates, applied to each unit vector in turn."""
        _, gatings = self.route(u_ext, small)
        fixed = {role: _across(gating) for role, gating in gatings.items()}
        unit = torch.eye(self.width_down, dtype=u_ext.dtype, device=u_ext.device)
        with unlowered(u_ext):
            columns = self._fixed(unit, small, fixed)
        columns = columns.expand(*u_ext.shape[:-1], *columns.shape[-2:])
        K = columns.mT
        if not self.shared:
            return K
        side = self.shared_scaling * torch.eye(self.shared, dtype=K.dtype, device=K.device)
        whole = K.new_zeros(*K.shape[:-2], K.shape[-2] + self.shared, K.shape[-1] + self.shared)
        whole[..., : K.shape[-2], : K.shape[-1]] = K
        whole[..., K.shape[-2] :, K.shape[-1] :] = side
        return whole

    def summed_mixing(self, u_ext: Tensor, small: Small, weight: Tensor) -> Tensor:
        """Return the sum over tokens of weight (...) times K_t, (P + S, Q + S).

        Where K_t is the gates' product, block by block, no K_t is made: sum_t w_t beta_t alpha_t^T (x) C.
        """
        if (
            self.pairing != "chain"
            or self.core not in ("none", "dense")
            or not {r for r, _ in self.gates} <= {"down", "up"}
        ):
            return torch.einsum("...pq,...->pq", self.mixing(u_ext, small), weight)
        _, gatings = self.route(u_ext, small)
        gates = [gatings[role].weight if role in gatings else weight.new_ones(1) for role in ("up", "down")]
        up, down = (gate.expand(*weight.shape, -1).flatten(0, -2).to(u_ext.dtype) for gate in gates)
        core = small["core"].to(up.dtype) if self.core == "dense" else torch.eye(self.ranks_up[0]).to(up)
        K = torch.kron((up * weight.reshape(-1, 1)).T @ down, core)
        side = weight.sum() * self.shared_scaling * torch.eye(self.shared, dtype=K.dtype, device=K.device)
        return torch.block_diag(K, side) if self.shared else K

    def _fixed(self, u: Tensor, small: Small, gatings: Mapping[str, Gating]) -> Tensor:
        """Apply the step linearly, with gates that are already decided."""
        if self.pairing == "tied":
            return self._paired(u, small, gatings.get("down"))
        z = self._mixed_down(_ranked(u, gatings.get("rank")), gatings.get("down"))
        z = apply_core(z, self.core, small.get("core"), gatings.get("core"))
        return spread_up(z, gatings.get("up"))

    def _tied(self, u: Tensor, u_ext: Tensor, small: Small, draws: Draws | None, gatings: dict[str, Gating]) -> Tensor:
        self._decide("down", u_ext, None, small, draws, gatings)
        return self._paired(u, small, gatings.get("down"))

    def _chain(self, u: Tensor, u_ext: Tensor, small: Small, draws: Draws | None, gatings: dict[str, Gating]) -> Tensor:
        self._decide("rank", u_ext, u, small, draws, gatings)
        self._decide("down", u_ext, None, small, draws, gatings)
        z = self._mixed_down(_ranked(u, gatings.get("rank")), gatings.get("down"))
        self._decide("core", u_ext, z, small, draws, gatings)
        z = apply_core(z, self.core, small.get("core"), gatings.get("core"))
        self._decide("up", u_ext, z, small, draws, gatings)
        return spread_up(z, gatings.get("up"))

    def _mixed_down(self, u: Tensor, gating: Gating | None) -> Tensor:
        if len(self.ranks_down) == 1 and gating is None:
            return u
        assert gating is not None
        return (gating.weight.unsqueeze(-1) * u.unflatten(-1, (len(self.ranks_down), -1))).sum(-2)

    def _paired(self, u: Tensor, small: Small, gating: Gating | None) -> Tensor:
        if self.core == "kron":
            u = _kron_cores(u, small["core"], self.ranks_down, self.scales)
        if gating is None:
            return u
        if len(set(self.ranks_down)) == 1:
            return (gating.weight.unsqueeze(-1) * u.unflatten(-1, (len(self.ranks_down), -1))).flatten(-2)
        repeats = torch.tensor(self.ranks_down, device=u.device)
        return gating.weight.repeat_interleave(repeats, -1, output_size=self.width_down) * u

    def _decide(
        self,
        role: str,
        u_ext: Tensor,
        z: Tensor | None,
        small: Small,
        draws: Draws | None,
        gatings: dict[str, Gating],
    ) -> None:
        gate = dict(self.gates).get(role)
        if gate is None:
            return
        scores = self._scores(role, gate, u_ext, z, small)
        noise = None
        if gate.score == "noisy":
            halves = scores.chunk(2, -1)[0]
            scores = noisy(scores, None if draws is None else draws.normal(halves, _PURPOSE[role]))
        elif gate.select == "sample" and draws is not None:
            noise = draws.gumbel(scores, _PURPOSE[role])
        bias, counted = small.get(f"select_bias_{role}"), small.get("counted")
        gatings[role] = decide(gate, scores, bias=bias, noise=noise, counted=counted)

    def _scores(self, role: str, gate: Gate, u_ext: Tensor, z: Tensor | None, small: Small) -> Tensor:
        given = small.get(f"logits_{role}")
        if gate.score == "activation":
            assert z is not None
            return z
        if role in self.places:
            scores = u_ext[..., self.places[role]]
        elif gate.input == "z":
            assert z is not None
            scores = F.linear(z, small[f"router_{role}"].to(z.dtype))
        else:
            assert given is not None
            return given.to(u_ext.dtype)
        scores = finish_scores(gate, scores, small.get(f"bias_{role}"), small.get(f"out_{role}"))
        return scores if given is None else scores + given.to(scores.dtype)


def finish_scores(gate: Gate, scores: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """Return logits from a router's product: bias added, an MLP's second layer, or |.| of a prototype's product."""
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if out is not None:
        scores = F.linear(scores.relu(), out.to(scores.dtype))
    return scores.abs() if gate.score == "prototype" else scores


def features(x: Tensor, rows: list[Tensor]) -> Tensor:
    """Return u_ext = [rows] x, (..., features), one product in the dtype of x; `rows` are (R, D) or (M, R, D)."""
    stacked = [stack_rows(matrix).to(x.dtype) for matrix in rows]
    return F.linear(x, stacked[0] if len(stacked) == 1 else torch.cat(stacked))


def apply_core(z: Tensor, kind: str, core: Tensor | None, gating: Gating | None) -> Tensor:
    """Return C_t z: a dense core (R, R), a gated bank (E, R, R) or a gated bank of diagonals (E, R).

    CoMoL's code multiplies row vectors, z^T C_e, so its cores act transposed; the bank keeps that.
    """
    if core is None or kind == "kron":
        return z
    if kind == "dense":
        return F.linear(z, core.to(z.dtype))
    weight = None if gating is None else gating.weight
    if kind == "diagonal":
        return z * (core[0] if weight is None else weight @ core.to(z.dtype))
    each = (z @ core.to(z.dtype).permute(1, 0, 2).flatten(1)).unflatten(-1, (core.shape[0], core.shape[2]))
    return each.squeeze(-2) if weight is None else (weight.unsqueeze(-1) * each).sum(-2)


def spread_up(z: Tensor, gating: Gating | None) -> Tensor:
    """Return v with block j = gate_j z, (..., N*R); z itself without a gate."""
    if gating is None:
        return z
    return (gating.weight.unsqueeze(-1) * z.unsqueeze(-2)).flatten(-2)


def up_product(v: Tensor, columns_OP: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return s * B v, (..., O), one product in `dtype`."""
    return F.linear((v * scaling).to(dtype), columns_OP.to(dtype))


def average(scores: Tensor, counted_BT: Tensor, granularity: str) -> Tensor:
    """Return scores (B, T, E) averaged over the counted tokens of a row, (B, 1, E), or over those so far, (B, T, E).

    By linearity this is the router's product with the average of what it reads.
    """
    counted = counted_BT.to(scores.dtype).unsqueeze(-1)
    if granularity == "sequence":
        return (scores * counted).sum(-2, keepdim=True) / counted.sum(-2, keepdim=True).clamp_min(1)
    return (scores * counted).cumsum(-2) / counted.cumsum(-2).clamp_min(1)


def _ranked(u: Tensor, gating: Gating | None) -> Tensor:
    return u if gating is None else gating.weight * u


def _across(gating: Gating) -> Gating:
    """Return the gating with an axis more before the experts, to be applied to many vectors of one token."""
    weight = gating.weight.unsqueeze(-2)
    return Gating(weight, weight, weight)


def _kron_cores(u: Tensor, kernels: Tensor, ranks: tuple[int, ...], scales: tuple[int, ...]) -> Tensor:
    """Apply I_r (x) K_e to each expert's ranks, ordered rank-major, (r, s_e); `kernels` holds all K_e flat."""
    parts, start = [], 0
    for part, scale in zip(u.split(list(ranks), -1), scales, strict=True):
        kernel = kernels[start : start + scale * scale].view(scale, scale).to(u.dtype)
        parts.append((part.unflatten(-1, (-1, scale)) @ kernel.T).flatten(-2))
        start += scale * scale
    return torch.cat(parts, -1)


__all__ = [
    "RankStep",
    "Small",
    "apply_core",
    "average",
    "features",
    "finish_scores",
    "spread_up",
    "stack_columns",
    "stack_rows",
    "unlowered",
    "unstack_columns",
    "up_product",
    "wide",
]
