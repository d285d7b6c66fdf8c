"""The mixture in rank space, as pure functions of tensors.

Every method here is y_t = W x_t + b + s * B K_t A x_t. It is computed K first: one product u = [A; routers] x, a step
in rank space v = K_t u, one product B v, so that no tensor of tokens x d_out is ever formed per expert, and a top-k is
a mask on v. Gates and everything else in rank space are float32 (float64 where x is); the two large products run in the
dtype of x. `fused` joins these into one autograd function.

Shapes: ... leading axes (rows, tokens), D d_in, O d_out, R rank of one expert, M down experts, N up experts, E paired
experts or cores, Q all ranks of the down bank, P all ranks of the up bank, S rank of the shared expert.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .gate import Gate
from .routers import Gating, decide, doubted, noisy

Small = Mapping[str, Tensor]
"""What the step reads beside u, by name: `router_up` (N, R), `core`, `logits_down` (..., E) given from outside, ..."""
Pairing = Literal["chain", "tied"]
Core = Literal["none", "dense", "bank", "diagonal", "kron", "residual", "residual_diagonal"]

# Numbers that keep the draws of a layer's routers apart; dropout masks are numbered from 0.
_PURPOSE = {"down": 1001, "up": 1002, "core": 1003, "rank": 1004}
_LEAVE_OUT = 1000


class Noise(Protocol):
    """Random numbers of one layer in one pass, each `purpose` its own, in the shape and dtype of `like`."""

    def normal(self, like: Tensor, purpose: int) -> Tensor:
        """Return standard normal numbers."""
        ...

    def keep(self, like: Tensor, probability: float, purpose: int) -> Tensor:
        """Return 0 with that probability, else a positive number."""
        ...

    def gumbel(self, like: Tensor, purpose: int) -> Tensor:
        """Return standard Gumbel numbers."""
        ...


def stack_rows(A_MRD: Tensor) -> Tensor:
    """Return the down experts as one matrix (Q, D): a view of (M, R, D), or (Q, D) itself where ranks differ."""
    return A_MRD if A_MRD.dim() == 2 else A_MRD.flatten(0, 1)


def stack_columns(B_NOR: Tensor) -> Tensor:
    """Return the up experts as one matrix (O, P), expert after expert; (O, P) itself where ranks differ."""
    return B_NOR if B_NOR.dim() == 2 else B_NOR.permute(1, 0, 2).flatten(1)


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
    # torch.autocast raises for devices that have none, such as meta; where it is off, it need not be switched.
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


@dataclass(frozen=True)
class RankStep:
    """The step from u_ext = [A; shared; routers that read x] x to v = K_t u, for one linear.

    u_ext holds the Q ranks of the down bank, the S ranks of the shared expert, then the rows of the routers that read
    x, in the order of `router_rows`. v holds the P ranks of the up bank, then the shared expert's, which no gate
    touches. `gates` leaves out those that are constant.
    """

    ranks_down: tuple[int, ...]
    ranks_up: tuple[int, ...]
    pairing: Pairing = "chain"
    core: Core = "none"
    gates: tuple[tuple[str, Gate], ...] = ()
    router_rows: tuple[tuple[str, int], ...] = ()
    scales: tuple[int, ...] = ()
    shared: int = 0
    shared_scaling: float = 1.0
    places: dict[str, slice] = field(init=False, repr=False, hash=False, compare=False)

    def __post_init__(self) -> None:
        # Where each router's rows stand in u_ext: behind the banks, in the order of `router_rows`.
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

    def mix(self, u_ext: Tensor, small: Small, draws: Noise | None = None) -> Tensor:
        """Return v (..., P + S) of u_ext (..., features), both in at least float32."""
        return self.route(u_ext, small, draws)[0]

    def route(self, u_ext: Tensor, small: Small, draws: Noise | None = None) -> tuple[Tensor, dict[str, Gating]]:
        """Return v and what each router decided. `draws` brings noise, in training only."""
        gates, gatings = dict(self.gates), dict[str, Gating]()

        def decided(role: str, z: Tensor | None) -> Gating | None:
            if role in gates:
                scores = self._scores(role, gates[role], u_ext, z, small)
                gatings[role] = self._decide(role, gates[role], scores, small, draws, u_ext.shape[:-1])
            return gatings.get(role)

        # Routers' rows stand in u_ext too, but no gate is a linear function of them: they never join the walk itself.
        with unlowered(u_ext):
            v = self._walk(u_ext[..., : self.width_down], small, decided)
            return self._beside_shared(v, u_ext), gatings

    def apply(self, u_ext: Tensor, small: Small, gatings: Mapping[str, Gating]) -> Tensor:
        """Return v with gates that are already decided, by role."""
        with unlowered(u_ext):
            v = self._walk(u_ext[..., : self.width_down], small, lambda role, _: gatings.get(role))
            return self._beside_shared(v, u_ext)

    def mixing(self, u_ext: Tensor, small: Small) -> Tensor:
        """Return K_t of every token, (..., P + S, Q + S): the step's gates, applied to each unit vector in turn."""
        _, gatings = self.route(u_ext, small)
        fixed = {role: _across(gating) for role, gating in gatings.items()}
        # With its gates decided the step is linear, so its images of unit vectors are the columns of K.
        unit = torch.eye(self.width_down, dtype=u_ext.dtype, device=u_ext.device)
        with unlowered(u_ext):
            columns = self._walk(unit, small, lambda role, _: fixed.get(role))
        # Where all gates are constant there is one K for all tokens.
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
        is_product = self.pairing == "chain" and self.core in ("none", "dense")
        if not is_product or not {role for role, _ in self.gates} <= {"down", "up"}:
            return torch.einsum("...pq,...->pq", self.mixing(u_ext, small), weight)
        _, gatings = self.route(u_ext, small)
        one = weight.new_ones(1)
        constant = Gating(one, one, one)
        # A gate that is left out as constant counts 1.
        gates = [gatings.get(role, constant).weight for role in ("up", "down")]
        up, down = (gate.expand(*weight.shape, -1).flatten(0, -2).to(u_ext.dtype) for gate in gates)
        # Without a core C is the identity: block (j, i) of K_t is beta_j alpha_i I.
        core = small.get("core", torch.eye(self.ranks_up[0])).to(up)
        K = torch.kron((up * weight.reshape(-1, 1)).T @ down, core)
        if not self.shared:
            return K
        side = weight.sum() * self.shared_scaling * torch.eye(self.shared, dtype=K.dtype, device=K.device)
        return torch.block_diag(K, side)

    def _walk(self, u: Tensor, small: Small, gating: Callable[[str, Tensor | None], Gating | None]) -> Tensor:
        """Return K_t u, (..., P): the up gates (x) C_t (sum_i alpha_i u_i), or the pairs' gates times their own ranks.

        `gating` is asked for each role once what its router reads is there (u or z, where it reads either).
        """
        if self.pairing == "tied":
            return self._paired(u, small, gating("down", None))
        # The order of the equation, from right to left: ranks, down experts, core, up experts.
        z = self._mixed_down(_ranked(u, gating("rank", u)), gating("down", None))
        z = apply_core(z, self.core, small.get("core"), gating("core", z))
        return spread_up(z, gating("up", z))

    def _beside_shared(self, v: Tensor, u_ext: Tensor) -> Tensor:
        """Return v and below it the shared expert's ranks, which no gate touches; its own scale over the mixture's."""
        if not self.shared:
            return v
        kept = u_ext[..., self.width_down : self.width_down + self.shared]
        return torch.cat([v, self.shared_scaling * kept], -1)

    def _mixed_down(self, u: Tensor, gating: Gating | None) -> Tensor:
        if len(self.ranks_down) == 1 and gating is None:
            return u
        # Several down experts without a gate would be one, their sum, and are refused before.
        assert gating is not None
        return (gating.weight.unsqueeze(-1) * u.unflatten(-1, (len(self.ranks_down), -1))).sum(-2)

    def _paired(self, u: Tensor, small: Small, gating: Gating | None) -> Tensor:
        if self.core == "kron":
            # C_e acts on each pair's own ranks, before the gate: B_e C_e A_e is one expert's update.
            u = _kron_cores(u, small["core"], self.ranks_down, self.scales)
        if gating is None:
            return u  # one pair, or pairs that all count 1
        # A pair's gate multiplies its own ranks: v keeps the width of u, and B sums over experts by itself.
        if len(set(self.ranks_down)) == 1:
            return (gating.weight.unsqueeze(-1) * u.unflatten(-1, (len(self.ranks_down), -1))).flatten(-2)
        return repeated(gating.weight, self.ranks_down) * u

    def _decide(
        self, role: str, gate: Gate, scores: Tensor, small: Small, draws: Noise | None, tokens: torch.Size
    ) -> Gating:
        noise = None
        if gate.score == "noisy":
            # Two products a router: the logits, and how far noise may move each. Noise in training only.
            scores, spread = scores.chunk(2, -1)
            if draws is not None:
                scores = noisy(scores, spread, draws.normal(scores, _PURPOSE[role]))
        elif gate.select == "sample" and draws is not None:
            noise = draws.gumbel(scores, _PURPOSE[role])
        kept = None
        if gate.dropout and draws is not None:
            scores = scores.expand(*tokens, scores.shape[-1])  # logits without tokens would share one draw
            kept = (draws.keep(scores, gate.dropout, _LEAVE_OUT + _PURPOSE[role]) > 0).to(scores.dtype)
        return decide(gate, scores, bias=small.get(f"select_bias_{role}"), noise=noise, kept=kept)

    def _scores(self, role: str, gate: Gate, u_ext: Tensor, z: Tensor | None, small: Small) -> Tensor:
        given = small.get(f"logits_{role}")
        # Ranks that choose themselves have no router: what they hold is their score.
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
        # task+x: the task's scores come from outside and are added to the token's.
        return scores if given is None else scores + given.to(scores.dtype)


def repeated(weight: Tensor, times: tuple[int, ...]) -> Tensor:
    """Return entry e of the last axis `times[e]` times, side by side: (..., E) to (..., sum of times)."""
    if len(set(times)) == 1:
        return weight.repeat_interleave(times[0], -1)
    # Not by a tensor of counts: made on the host, it would have a GPU wait for its copy at every linear.
    return torch.cat([part.expand(*part.shape[:-1], n) for part, n in zip(weight.split(1, -1), times, strict=True)], -1)


def finish_scores(gate: Gate, scores: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """Return logits from a router's product: bias added, an MLP's second layer, or |.| of a prototype's product."""
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    # An MLP's first layer is among the rows that read x or z; only its second, E wide, comes here.
    if out is not None:
        scores, hidden = F.linear(scores.relu(), out.to(scores.dtype)), scores.relu()
        if gate.draws > 1:
            scores = doubted(scores, hidden, out.to(scores.dtype), gate.draws)
    if gate.score == "prototype":
        # Arrow's prototypes are directions (singular vectors), whose sign says nothing.
        scores = scores.abs()
    return scores


def features(x: Tensor, rows: list[Tensor]) -> Tensor:
    """Return u_ext = [rows] x, (..., features), one product in the dtype of x; `rows` are (R, D) or (M, R, D)."""
    # One wide product instead of one for each bank and router: x is read from memory once.
    stacked = [stack_rows(matrix).to(x.dtype) for matrix in rows]
    if len(stacked) == 1:
        return F.linear(x, stacked[0])
    return F.linear(x, torch.cat(stacked))


def apply_core(z: Tensor, kind: str, core: Tensor | None, gating: Gating | None) -> Tensor:
    """Return C_t z: a dense core (R, R), a gated bank (E, R, R) or a gated bank of diagonals (E, R).

    CoMoL's code multiplies row vectors, z^T C_e, so its cores act transposed; the bank keeps that. The residual kinds
    are I + a bank: z itself, and what the bank makes of it.
    """
    if core is None or kind == "kron":
        return z
    if kind.startswith("residual"):
        return z + apply_core(z, "diagonal" if kind == "residual_diagonal" else "bank", core, gating)
    if kind == "dense":
        return F.linear(z, core.to(z.dtype))
    if kind == "diagonal":
        if gating is None:
            return z * core[0]
        return z * (gating.weight @ core.to(z.dtype))
    # All cores in one product, then their mean: never a core of a token's own, which would be R times as large.
    each = (z @ core.to(z.dtype).permute(1, 0, 2).flatten(1)).unflatten(-1, (core.shape[0], core.shape[2]))
    if gating is None:
        return each.squeeze(-2)
    return (gating.weight.unsqueeze(-1) * each).sum(-2)


def spread_up(z: Tensor, gating: Gating | None) -> Tensor:
    """Return v with block j = gate_j z, (..., N*R); z itself without a gate."""
    if gating is None:
        return z
    # sum_j beta_j B_j z = [B_1 .. B_N] (beta (x) z): R N numbers a token instead of N vectors of d_out.
    return (gating.weight.unsqueeze(-1) * z.unsqueeze(-2)).flatten(-2)


def up_product(v: Tensor, columns_OP: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return s * B v, (..., O), one product in `dtype`."""
    # Scaled before the product: P numbers a token instead of d_out, and still in float32.
    return F.linear((v * scaling).to(dtype), columns_OP.to(dtype))


def prompt_mean(scores: Tensor, prompt_BT: Tensor) -> Tensor:
    """Return scores (B, T, E) averaged over the prompt's tokens, (B, 1, E).

    By linearity this is the router's product with the average of what it reads, and T scores are fewer than T inputs.
    """
    weight = prompt_BT.to(scores.dtype).unsqueeze(-1)
    # A row without a prompt has the mean 0, not 0 / 0.
    return (scores * weight).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True).clamp_min(1)


def _ranked(u: Tensor, gating: Gating | None) -> Tensor:
    return u if gating is None else gating.weight * u


def _across(gating: Gating) -> Gating:
    """Return the gating with an axis more before the experts, to be applied to many vectors of one token."""
    weight = gating.weight.unsqueeze(-2)
    return Gating(weight, weight, weight)


def kron_banks(seed_RD: Tensor, seed_OR: Tensor, scales: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return A_e = A[:, :D/s] (x) I_s one below the other, and B_e = B[:O/s] (x) I_s side by side, for every scale s.

    With a core I_r (x) K_e between them, B_e C_e A_e = (B A)[:O/s, :D/s] (x) K_e (EPT, reconstruction). Where s does
    not divide a width, the seed's part is rounded up and what is unfolded is cut to the linear's size.
    """
    d_in, d_out = seed_RD.shape[1], seed_OR.shape[0]
    rows, columns = [], []
    for scale in scales:
        unit = torch.eye(scale, dtype=seed_RD.dtype, device=seed_RD.device)
        rows.append(torch.kron(seed_RD[:, : -(-d_in // scale)].contiguous(), unit)[:, :d_in])
        columns.append(torch.kron(seed_OR[: -(-d_out // scale)].contiguous(), unit)[:d_out])
    return torch.cat(rows), torch.cat(columns, -1)


def _kron_cores(u: Tensor, kernels: Tensor, ranks: tuple[int, ...], scales: tuple[int, ...]) -> Tensor:
    """Apply I_r (x) K_e to each expert's ranks, ordered rank-major, (r, s_e); `kernels` holds all K_e flat."""
    # (I_r (x) K) u is a product with K on each rank's s entries: no Kronecker product is formed.
    parts, start = [], 0
    for part, scale in zip(u.split(list(ranks), -1), scales, strict=True):
        kernel = kernels[start : start + scale * scale].view(scale, scale).to(u.dtype)
        parts.append((part.unflatten(-1, (-1, scale)) @ kernel.T).flatten(-2))
        start += scale * scale
    return torch.cat(parts, -1)


__all__ = [
    "Core",
    "Noise",
    "Pairing",
    "RankStep",
    "Small",
    "features",
    "finish_scores",
    "kron_banks",
    "prompt_mean",
    "repeated",
    "stack_columns",
    "stack_rows",
    "unlowered",
    "unstack_columns",
    "up_product",
    "wide",
]
