"""Every row of the table in float64: token by token, expert by expert, straight from the formulas.

`update(method, tensors, row)` is s^-1 times what the method adds to the frozen output of one row, (T, O). Numbers that
are not in the tensors (k, temperature, limits) are written out where they are used, as the specification has them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import reference_gates as gates
import torch
from reference import softmax
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass
class Row:
    """A row: x (T, D), its task, the vector it brings, the first pass's states (T, H), which tokens are prompt (T),
    and the mark of each (T)."""

    x: Tensor
    task: int = 0
    vector: Tensor | None = None
    hidden: Tensor | None = None
    prompt: list[bool] | None = None
    block_input: Tensor | None = None
    marks: list[int] | None = None


def update(method: str, t: Tensors, row: Row) -> Tensor:
    return torch.stack([_TOKEN[method](t, row, place) for place in range(len(row.x))])


def experts(t: Tensors) -> list[tuple[Tensor, Tensor]]:
    """Return the pairs (A_e, B_e)."""
    return list(zip(t["mixture_A"], t["mixture_B"], strict=True))


def paired(weights: Tensor, t: Tensors, x: Tensor) -> Tensor:
    """Return sum_e g_e B_e A_e x."""
    return sum(g * (up @ (down @ x)) for g, (down, up) in zip(weights, experts(t), strict=True))


def by_router(gate: Callable[[Tensor], Tensor]) -> Callable[[Tensors, Row, int], Tensor]:
    """Return paired experts under a gate that reads the token."""
    return lambda t, row, place: paired(gate(t["mixture_router_down"] @ row.x[place]), t, row.x[place])


def d2mora(t: Tensors, row: Row, place: int) -> Tensor:
    x = row.x[place]
    alpha = softmax(t["mixture_router_down"] @ x)
    z = sum(a * (down @ x) for a, down in zip(alpha, t["mixture_A"], strict=True))
    beta = softmax(t["mixture_router_up"] @ z)
    return sum(b * (up @ z) for b, up in zip(beta, t["mixture_B"], strict=True))


def lora(t: Tensors, row: Row, place: int) -> Tensor:
    return t["mixture_B"][0] @ (t["mixture_A"][0] @ row.x[place])


def moslora(t: Tensors, row: Row, place: int) -> Tensor:
    return t["mixture_B"][0] @ (t["mixture_core"] @ (t["mixture_A"][0] @ row.x[place]))


def hydralora(t: Tensors, row: Row, place: int) -> Tensor:
    x = row.x[place]
    beta = softmax(t["mixture_router_up"] @ x)
    return sum(b * (up @ (t["mixture_A"][0] @ x)) for b, up in zip(beta, t["mixture_B"], strict=True))


def comol(t: Tensors, row: Row, place: int) -> Tensor:
    """Row vectors in the authors' code, z^T C, so the cores act transposed."""
    z = t["mixture_A"][0] @ row.x[place]
    g = softmax(t["mixture_router_core"] @ z)
    core = sum(weight * each for weight, each in zip(g, t["mixture_core"], strict=True))
    return t["mixture_B"][0] @ (core.T @ z)


def mofme(t: Tensors, row: Row, place: int) -> Tensor:
    z = t["mixture_A"][0] @ row.x[place]
    inner = torch.relu(t["mixture_router_core"] @ z + t["mixture_bias_core"])
    g = gates.renormalised(t["mixture_out_core"] @ inner, 2)
    modulation = sum(weight * each for weight, each in zip(g, t["mixture_core"], strict=True))
    return t["mixture_B"][0] @ (modulation * z)


def smora(t: Tensors, row: Row, place: int) -> Tensor:
    """Two of the ranks in the tests: those of the largest sigmoid plus bias, each twice its part of both."""
    x = row.x[place]
    values = 1 / (1 + torch.exp(-(t["mixture_router_rank"] @ x))) + t["mixture_select_bias_rank"]
    chosen = gates.largest(values, 2)
    total = sum(values[rank] for rank in chosen)
    u = t["mixture_A"][0] @ x
    return sum(t["mixture_B"][0][:, rank] * u[rank] * 2 * values[rank] / total for rank in chosen)


def residual_cores(t: Tensors, row: Row, place: int) -> Tensor:
    """LoRA's z, and what the mean of the cores makes of it; cores act transposed, as CoMoL's."""
    z = t["mixture_A"][0] @ row.x[place]
    g = softmax(t["mixture_router_core"] @ z)
    core = torch.eye(len(z), dtype=z.dtype) + sum(w * each for w, each in zip(g, t["mixture_core"], strict=True))
    return t["mixture_B"][0] @ (core.T @ z)


def residual_scales(t: Tensors, row: Row, place: int) -> Tensor:
    z = t["mixture_A"][0] @ row.x[place]
    g = softmax(t["mixture_router_core"] @ z)
    return t["mixture_B"][0] @ ((1 + sum(w * each for w, each in zip(g, t["mixture_core"], strict=True))) * z)


def mora(t: Tensors, row: Row, place: int) -> Tensor:
    u = t["mixture_A"][0] @ row.x[place]
    return t["mixture_B"][0] @ (gates.self_activated(u, 2, 0.1) * u)


def flylora(t: Tensors, row: Row, place: int) -> Tensor:
    u = t["mixture_A"][0] @ row.x[place]
    chosen = gates.largest((u + t["mixture_select_bias_rank"]).abs(), 2)
    return t["mixture_B"][0] @ (gates.mask(chosen, len(u)) * u)


def moelora(t: Tensors, row: Row, place: int) -> Tensor:
    return paired(softmax(t["mixture_router_task"] @ t["mixture_task_embedding"][row.task]), t, row.x[place])


def llava_mole(t: Tensors, row: Row, place: int) -> Tensor:
    """The router reads the block's input, which is the first linear's."""
    reads = row.x if row.block_input is None else row.block_input
    logits = t["mixture_router_down"] @ reads[place] + t["mixture_bias_down"]
    return paired(gates.mask(gates.largest(logits, 1), len(logits)), t, row.x[place])


def noisy_top_k(t: Tensors, row: Row, place: int) -> Tensor:
    """Without noise, as at inference: the first half of the rows is the router, top-1 weighs one."""
    num = len(t["mixture_A"])
    logits = t["mixture_router_down"][:num] @ row.x[place]
    return paired(gates.renormalised(logits, 1), t, row.x[place])


def xlora(t: Tensors, row: Row, place: int) -> Tensor:
    assert row.hidden is not None
    logits = t["mixture_router_down"] @ row.hidden[place] + t["mixture_bias_down"]
    return paired(softmax(logits), t, row.x[place])


def cat(t: Tensors, row: Row, place: int) -> Tensor:
    return paired(softmax(t["mixture_logits_down"]), t, row.x[place])


def reclora(t: Tensors, row: Row, place: int) -> Tensor:
    assert row.vector is not None
    return paired(softmax(t["mixture_router_down"] @ row.vector), t, row.x[place])


def ept(t: Tensors, row: Row, place: int) -> Tensor:
    """DeltaW_e = (B A)[:o / s, :d / s] (x) K_e, parts of the seed rounded up and what comes out cut to o x d."""
    g = gates.softmax_of_chosen(t["mixture_router_task"] @ t["mixture_task_embedding"][row.task], 2, 0.05)
    seed, total, start = t["mixture_B"][0] @ t["mixture_A"][0], 0, 0
    for weight, s in zip(g, (2, 2, 4, 4, 6, 6, 8, 8), strict=True):
        kernel = t["mixture_core"][start : start + s * s].view(s, s)
        small = seed[: (seed.shape[0] + s - 1) // s, : (seed.shape[1] + s - 1) // s]
        whole = torch.kron(small.contiguous(), kernel.contiguous())[: seed.shape[0], : seed.shape[1]]
        total = total + weight * (whole @ row.x[place])
        start += s * s
    return total


def scalezero(t: Tensors, row: Row, place: int) -> Tensor:
    return paired(gates.bounded(t["mixture_logits_down"]), t, row.x[place])


def base_gate(t: Tensors, row: Row, place: int) -> Tensor:
    """One gate a row, from the mean of its prompt."""
    assert row.prompt is not None
    prompt = [x for x, is_prompt in zip(row.x, row.prompt, strict=True) if is_prompt]
    logits = t["mixture_router_down"] @ (sum(prompt) / len(prompt)) + t["mixture_bias_down"]
    return paired(1 / (1 + torch.exp(-logits)), t, row.x[place])


def peam(t: Tensors, row: Row, place: int) -> Tensor:
    return t["mixture_B"][row.task] @ (t["mixture_A"][row.task] @ row.x[place])


def clora(t: Tensors, row: Row, place: int) -> Tensor:
    """The mark's own expert, and nothing in no span."""
    assert row.marks is not None
    mark = row.marks[place]
    if mark == 0:
        return 0 * (t["mixture_B"][0] @ (t["mixture_A"][0] @ row.x[place]))
    return t["mixture_B"][mark - 1] @ (t["mixture_A"][mark - 1] @ row.x[place])


def sketchassist(t: Tensors, row: Row, place: int) -> Tensor:
    of_task = t["mixture_router_task"] @ t["mixture_task_embedding"][row.task]
    return paired(softmax(t["mixture_router_down"] @ row.x[place] + of_task), t, row.x[place])


_TOKEN: dict[str, Callable[[Tensors, Row, int], Tensor]] = {
    "d2mora": d2mora,
    "lora": lora,
    "moslora": moslora,
    "hydralora": hydralora,
    "comol": comol,
    "mofme": mofme,
    "smora": smora,
    "residual_cores": residual_cores,
    "residual_scales": residual_scales,
    "mora": mora,
    "flylora": flylora,
    "moelora": moelora,
    "loramoe": by_router(softmax),
    "mola": by_router(lambda logits: gates.renormalised(logits, 2)),
    "dynmole": by_router(lambda logits: gates.by_entropy(logits, 1.1, 0.9, 0.75, 2)),
    "llava_mole": llava_mole,
    "noisy_top_k": noisy_top_k,
    # After training.
    "lora_mixer": by_router(lambda logits: gates.renormalised(logits, 3)),
    # Not sampling, as at inference.
    "remix": by_router(lambda logits: 0.5 * gates.mask(gates.largest(logits, 2), len(logits))),
    "meteora": by_router(lambda logits: gates.softmax_of_chosen(logits, 2)),
    "xlora": xlora,
    "cat": cat,
    "rocket": by_router(lambda logits: gates.renormalised(logits, 2)),
    "reclora": reclora,
    "ept": ept,
    "scalezero": scalezero,
    "base_gate": base_gate,
    "peam": peam,
    "clora": clora,
    "sketchassist": sketchassist,
}
METHODS = tuple(_TOKEN)
