"""The step in rank space as a Triton kernel pair: one launch forward, one backward, where torch takes dozens.

Covers banks of equal ranks whose routers are linear and weigh by softmax, all experts or the k best: D2MoRA, HydraLoRA,
MoLA, LoRAMoE, LLaVA-MoLE without capacity and their like; `covers` tells. Everything else, and every CPU, takes the
plain twin `ops.RankStep`, which this equals up to float32 rounding. Gates and sums in float32; no atomics, so equal
inputs give equal bits.

Each program holds a block of tokens. Widths are padded to powers of two and masked, as Triton asks.

Shapes: T tokens, F rows that read x, M down experts, N up experts, R rank, P = N R, S ranks of the shared expert.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qd2mora.mixture.kernels import OPTIONS
from qd2mora.routed.gate import Gate
from qd2mora.routed.ops import RankStep, Small

TILE = 4096
"""Entries of the largest tile a program holds; a token that needs more takes the twin."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def covers(step: RankStep, small: Small, dtype: torch.dtype) -> bool:
    """Tell whether the kernels compute this step."""
    gates = dict(step.gates)
    if not gates:
        return False  # nothing to launch for
    # Whatever else a step reads (cores, biases, logits from outside) the twin alone knows.
    if step.core != "none" or "rank" in gates or dtype not in DTYPES or set(small) - {"router_up"}:
        return False
    if len({*step.ranks_down, *step.ranks_up}) != 1 or any(role not in ("down", "up") for role in gates):
        return False
    if not all(_is_plain(gate) for gate in gates.values()):
        return False
    has_scores = all(role in step.places or (role == "up" and gate.input == "z") for role, gate in gates.items())
    tile = _power(max(len(step.ranks_down), len(step.ranks_up))) * _power(step.ranks_up[0])
    return has_scores and tile <= TILE


def try_out(device: torch.device) -> None:
    """Launch the smallest step once. Raises what Triton raises where it cannot compile or launch."""
    gate = Gate()
    step = RankStep((1, 1), (1,), gates=(("down", gate),), router_rows=(("down", 2),))
    mix(step, torch.zeros(1, step.features, device=device), {})


def mix(step: RankStep, u_ext: Tensor, small: Small) -> Tensor:
    """Return v (..., P + S) float32 of u_ext (..., F) in 16 or 32 bits."""
    kernel = _KernelConstants.of(step)
    # A view on what `fused` makes; the kernels count places from one start with one stride.
    u_TF = u_ext.reshape(-1, u_ext.shape[-1]).contiguous()
    v_TP = torch.empty(len(u_TF), step.width_up + step.shared, dtype=torch.float32, device=u_TF.device)
    # Any pointer does for a router that is not there: no branch of the kernel reads it.
    router = small.get("router_up", u_TF)
    _forward[kernel.grid(len(u_TF))](u_TF, router.contiguous(), v_TP, len(u_TF), **kernel.constants, **OPTIONS)
    return v_TP.view(*u_ext.shape[:-1], -1)


def through(step: RankStep, u_ext: Tensor, small: Small, dv: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return v, and of its gradient `dv` (..., P + S) those of u_ext and of the up router, all float32."""
    kernel = _KernelConstants.of(step)
    u_TF = u_ext.reshape(-1, u_ext.shape[-1]).contiguous()
    dv_TP = dv.reshape(len(u_TF), -1).contiguous()
    v_TP = torch.empty(len(u_TF), step.width_up + step.shared, dtype=torch.float32, device=u_TF.device)
    # Not initialised: of each token the kernel writes every entry just once (banks, shared expert, routers).
    du_TF = torch.empty(u_TF.shape, dtype=torch.float32, device=u_TF.device)
    router, grid = small.get("router_up"), kernel.grid(len(u_TF))
    parts, given = v_TP, u_TF  # any pointers do for a router that is not there
    if router is not None:
        # Each block's share of the router's gradient, added up afterwards in a fixed order: no atomics.
        parts, given = v_TP.new_empty(grid[0], *router.shape), router.contiguous()
    _backward[grid](u_TF, given, dv_TP, v_TP, du_TF, parts, len(u_TF), **kernel.constants, **OPTIONS)
    drouter = None
    if router is not None:
        drouter = parts.sum(0).to(router.dtype)
    lead = u_ext.shape[:-1]
    return v_TP.view(*lead, -1), du_TF.view(*lead, -1), drouter


@dataclass(frozen=True)
class _KernelConstants:
    """A step as the kernels' compile-time constants."""

    constants: dict[str, int | bool | float]

    @classmethod
    def of(cls, step: RankStep) -> "_KernelConstants":
        # Known when it is compiled: loops unroll and branches go, for one compilation of each kind of linear in a
        # model.
        rank, gates = step.ranks_up[0], dict(step.gates)
        down, up = gates.get("down"), gates.get("up")
        num_down, num_up = len(step.ranks_down), len(step.ranks_up)
        widths = {"MP": _power(num_down), "NP": _power(num_up), "RP": _power(rank), "SP": _power(max(1, step.shared))}
        tokens = max(1, min(64, TILE // (max(widths["MP"], widths["NP"]) * widths["RP"])))
        return cls(
            {
                **{"M": num_down, "N": num_up, "R": rank, "S": step.shared, "F": step.features, "BT": tokens},
                **widths,
                "SHARED": step.shared_scaling,
                "TIED": step.pairing == "tied",
                "DOWN_AT": _first_row(step, "down"),
                "UP_AT": _first_row(step, "up"),
                "UP_Z": up is not None and up.input == "z",
                **_fields("DOWN", down, num_down),
                **_fields("UP", up, num_up),
            }
        )

    def grid(self, tokens: int) -> tuple[int]:
        return (triton.cdiv(tokens, self.constants["BT"]),)


def _first_row(step: RankStep, role: str) -> int:
    """Return where a router's rows stand in u, -1 where they do not."""
    if role not in step.places:
        return -1
    return int(step.places[role].start)


def _fields(role: str, gate: Gate | None, num_experts: int) -> dict[str, int | bool | float]:
    """Return a gate as constants: how many are chosen (0 is all), whether they are renormalised, 1 / temperature."""
    if gate is None:
        return {f"{role}_K": 0, f"{role}_RENORM": False, f"{role}_SHARP": 1.0}
    chosen = gate.top_k or 0
    if gate.select == "all" or chosen >= num_experts:
        chosen = 0
    return {
        f"{role}_K": chosen,
        f"{role}_RENORM": gate.weight == "renorm",
        f"{role}_SHARP": 1.0 / gate.temperature,
    }


def _is_plain(gate: Gate) -> bool:
    # A load bias enters the choice alone, noise the scores, a sample draws: the twin knows of these.
    return (
        gate.score == "linear"
        and gate.select in ("all", "top_k")
        and gate.weight in ("softmax", "renorm")
        and gate.input in ("x", "z")
        and not gate.has_moved_bias
    )


def _power(width: int) -> int:
    return 1 << (width - 1).bit_length()


@triton.jit
def _decide(scores, is_expert, K: tl.constexpr, RENORM: tl.constexpr, SHARP: tl.constexpr, EP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return probabilities, what is chosen (0 or 1) and weights of scores (BT, EP)."""
    # Experts past E only pad to a power of two: probability 0, never chosen.
    masked = tl.where(is_expert[None, :], scores, float("-inf"))
    scaled = masked * SHARP
    powers = tl.exp(scaled - tl.max(scaled, 1)[:, None])
    probs = powers / tl.sum(powers, 1)[:, None]
    chosen = tl.where(is_expert[None, :], 1.0, 0.0) + tl.zeros_like(probs)
    if K > 0:
        # The best of what is left, K times; of equal scores the first.
        number = tl.arange(0, EP)[None, :] + tl.zeros(scores.shape, tl.int32)
        left, chosen = masked, tl.zeros_like(probs)
        for _ in tl.static_range(K):
            # By scores, as in the twin: probabilities may round to one number where scores still differ.
            best = left == tl.max(left, 1)[:, None]
            first = tl.min(tl.where(best, number, EP), 1)
            picked = number == first[:, None]
            chosen = tl.where(picked, 1.0, chosen)
            left = tl.where(picked, float("-inf"), left)
    weight = probs * chosen
    if RENORM:
        weight = weight / tl.sum(weight, 1)[:, None]
    return probs, chosen, weight


@triton.jit
def _decide_back(dweight, probs, chosen, weight, RENORM: tl.constexpr, SHARP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the gradient of the scores."""
    # The softmax's own gradient, over the chosen where they are renormalised, over all where they are not.
    if RENORM:
        return weight * (dweight - tl.sum(weight * dweight, 1)[:, None]) * SHARP
    dprobs = dweight * chosen
    return probs * (dprobs - tl.sum(probs * dprobs, 1)[:, None]) * SHARP


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    u_ptr,
    router_ptr,
    v_ptr,
    T,
    M: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    F: tl.constexpr,
    BT: tl.constexpr,
    MP: tl.constexpr,
    NP: tl.constexpr,
    RP: tl.constexpr,
    SP: tl.constexpr,
    SHARED: tl.constexpr,
    TIED: tl.constexpr,
    DOWN_AT: tl.constexpr,
    UP_AT: tl.constexpr,
    UP_Z: tl.constexpr,
    DOWN_K: tl.constexpr,
    DOWN_RENORM: tl.constexpr,
    DOWN_SHARP: tl.constexpr,
    UP_K: tl.constexpr,
    UP_RENORM: tl.constexpr,
    UP_SHARP: tl.constexpr,
):
    t, m, n, r = _places(BT, MP, NP, RP)
    is_token, is_down, is_up, is_rank = t < T, m < M, n < N, r < R
    has_down, has_up = _all_there(is_token, is_down, is_rank), _all_there(is_token, is_up, is_rank)
    at = t.to(tl.int64)  # T x F passes 2^31 in long batches
    u = tl.load(u_ptr + _cube(at, m, r, F, R), mask=has_down, other=0.0).to(tl.float32)
    if DOWN_AT >= 0:
        scores = _square(u_ptr + DOWN_AT, at, m, is_token, is_down, F)
        _, _, down = _decide(scores, is_down, DOWN_K, DOWN_RENORM, DOWN_SHARP, MP)
        u = u * down[:, :, None]
    if TIED:
        tl.store(v_ptr + _cube(at, m, r, N * R + S, R), u, mask=has_down)
    else:
        # Chained banks: z = sum_i alpha_i u_i, the one code that all up experts read; v_j = beta_j z.
        z = tl.sum(u, 1)
        # Without an up gate there is one up expert (`check_counts`), and v is z.
        v = z[:, None, :] + tl.zeros([BT, NP, RP], tl.float32)
        if UP_Z or UP_AT >= 0:
            if UP_Z:
                router = _matrix(router_ptr, n, r, is_up, is_rank, R)
                scores = tl.sum(z[:, None, :] * router[None, :, :], 2)
            else:
                scores = _square(u_ptr + UP_AT, at, n, is_token, is_up, F)
            _, _, up = _decide(scores, is_up, UP_K, UP_RENORM, UP_SHARP, NP)
            v = up[:, :, None] * z[:, None, :]
        tl.store(v_ptr + _cube(at, n, r, N * R + S, R), v, mask=has_up)
    if S > 0:
        s = tl.arange(0, SP)
        kept = _square(u_ptr + M * R, at, s, is_token, s < S, F)
        _put_square(v_ptr + N * R, kept * SHARED, at, s, is_token, s < S, N * R + S)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    u_ptr,
    router_ptr,
    dv_ptr,
    v_ptr,
    du_ptr,
    drouter_ptr,
    T,
    M: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    F: tl.constexpr,
    BT: tl.constexpr,
    MP: tl.constexpr,
    NP: tl.constexpr,
    RP: tl.constexpr,
    SP: tl.constexpr,
    SHARED: tl.constexpr,
    TIED: tl.constexpr,
    DOWN_AT: tl.constexpr,
    UP_AT: tl.constexpr,
    UP_Z: tl.constexpr,
    DOWN_K: tl.constexpr,
    DOWN_RENORM: tl.constexpr,
    DOWN_SHARP: tl.constexpr,
    UP_K: tl.constexpr,
    UP_RENORM: tl.constexpr,
    UP_SHARP: tl.constexpr,
):
    t, m, n, r = _places(BT, MP, NP, RP)
    is_token, is_down, is_up, is_rank = t < T, m < M, n < N, r < R
    has_down, has_up = _all_there(is_token, is_down, is_rank), _all_there(is_token, is_up, is_rank)
    at = t.to(tl.int64)
    u = tl.load(u_ptr + _cube(at, m, r, F, R), mask=has_down, other=0.0).to(tl.float32)
    # The forward pass again, then back through it; gates and z are never stored between the passes.
    mixed = u
    if DOWN_AT >= 0:
        scores = _square(u_ptr + DOWN_AT, at, m, is_token, is_down, F)
        down_probs, down_chosen, down = _decide(scores, is_down, DOWN_K, DOWN_RENORM, DOWN_SHARP, MP)
        mixed = u * down[:, :, None]
    if TIED:
        dv = tl.load(dv_ptr + _cube(at, m, r, N * R + S, R), mask=has_down, other=0.0).to(tl.float32)
        tl.store(v_ptr + _cube(at, m, r, N * R + S, R), mixed, mask=has_down)
        dmixed = dv
    else:
        dv = tl.load(dv_ptr + _cube(at, n, r, N * R + S, R), mask=has_up, other=0.0).to(tl.float32)
        z = tl.sum(mixed, 1)
        v = z[:, None, :] + tl.zeros([BT, NP, RP], tl.float32)
        dz = tl.sum(dv, 1)
        if UP_Z or UP_AT >= 0:
            if UP_Z:
                router = _matrix(router_ptr, n, r, is_up, is_rank, R)
                scores = tl.sum(z[:, None, :] * router[None, :, :], 2)
            else:
                scores = _square(u_ptr + UP_AT, at, n, is_token, is_up, F)
            up_probs, up_chosen, up = _decide(scores, is_up, UP_K, UP_RENORM, UP_SHARP, NP)
            v = up[:, :, None] * z[:, None, :]
            # v = g z: the gradient goes to z through the gate, and to the gate's scores through z.
            dz = tl.sum(up[:, :, None] * dv, 1)
            dup = tl.sum(dv * z[:, None, :], 2)
            dscores = _decide_back(dup, up_probs, up_chosen, up, UP_RENORM, UP_SHARP)
            if UP_Z:
                # The up router reads z as well: the second way by which z gets a gradient.
                dz += tl.sum(dscores[:, :, None] * router[None, :, :], 1)
                # Tokens past the end add nothing to the sum over tokens.
                live = tl.where(is_token[:, None], dscores, 0.0)
                drouter = tl.sum(live[:, :, None] * z[:, None, :], 0)
                place = drouter_ptr + tl.program_id(0) * N * R + n[:, None] * R + r[None, :]
                tl.store(place, drouter, mask=is_up[:, None] & is_rank[None, :])
            else:
                # A router of x has rows in u, so that the gradient of its scores goes out with du.
                _put_square(du_ptr + UP_AT, dscores, at, n, is_token, is_up, F)
        tl.store(v_ptr + _cube(at, n, r, N * R + S, R), v, mask=has_up)
        dmixed = dz[:, None, :] + tl.zeros([BT, MP, RP], tl.float32)
    if DOWN_AT >= 0:
        # mixed = g u: the same two ways, to the gate's scores through u and to u through the gate.
        ddown = tl.sum(dmixed * u, 2)
        dscores = _decide_back(ddown, down_probs, down_chosen, down, DOWN_RENORM, DOWN_SHARP)
        _put_square(du_ptr + DOWN_AT, dscores, at, m, is_token, is_down, F)
        dmixed = dmixed * down[:, :, None]
    tl.store(du_ptr + _cube(at, m, r, F, R), dmixed, mask=has_down)
    if S > 0:
        s = tl.arange(0, SP)
        # The shared expert meets no gate: its own scale, in both directions.
        dkept = _square(dv_ptr + N * R, at, s, is_token, s < S, N * R + S)
        kept = _square(u_ptr + M * R, at, s, is_token, s < S, F)
        _put_square(v_ptr + N * R, kept * SHARED, at, s, is_token, s < S, N * R + S)
        _put_square(du_ptr + M * R, dkept * SHARED, at, s, is_token, s < S, F)


@triton.jit
def _places(BT: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, RP: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, MP), tl.arange(0, NP), tl.arange(0, RP)


@triton.jit
def _cube(t, e, r, WIDTH: tl.constexpr, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return where the ranks of each expert of each token stand, (BT, EP, RP), in rows of WIDTH."""
    return t[:, None, None] * WIDTH + e[None, :, None] * R + r[None, None, :]


@triton.jit
def _all_there(is_t, is_e, is_r):  # type: ignore[no-untyped-def]
    return is_t[:, None, None] & is_e[None, :, None] & is_r[None, None, :]


@triton.jit
def _square(ptr, t, e, is_t, is_e, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    place = ptr + t[:, None] * WIDTH + e[None, :]
    return tl.load(place, mask=is_t[:, None] & is_e[None, :], other=0.0).to(tl.float32)


@triton.jit
def _put_square(ptr, value, t, e, is_t, is_e, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(ptr + t[:, None] * WIDTH + e[None, :], value, mask=is_t[:, None] & is_e[None, :])


@triton.jit
def _matrix(ptr, e, r, is_e, is_r, R: tl.constexpr):  # type: ignore[no-untyped-def]
    place = ptr + e[:, None] * R + r[None, :]
    return tl.load(place, mask=is_e[:, None] & is_r[None, :], other=0.0).to(tl.float32)


__all__ = ["covers", "mix", "through"]
