"""Scores that do not come out of a linear's one product: of the task, a span, a row's vector, a first pass, a block.

Routers that read a token's x stand in the product u = [A; routers] x, and those that read z come after it; for both
`ops.RankStep` needs nothing from here. All others are scored before the step, which takes their logits as given.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from qd2mora.mixture.routing import Routing
from qd2mora.mixture.spec import LinearSpec
from qd2mora.routed import ops
from qd2mora.routed.gate import Gate
from qd2mora.routed.text import Key, Router


def is_given(gate: Gate) -> bool:
    """Tell whether a router is scored before the step, which elsewhere finds all it needs in u."""
    return not (gate.input in ("z", "self") or (gate.reads_x and gate.input == "x"))


def given_logits(
    role: str, x: Tensor, tensors: dict[str, Tensor], routing: Routing, adapter: str, spec: LinearSpec
) -> Tensor:
    """Return logits that broadcast to (..., E), of a router that `is_given`.

    Raises ValueError where the pass does not say what the gate reads: the task, the marks, the vector, the prompt.
    """
    gate, place = spec.gate(role), spec.place
    assert gate is not None
    if gate.scope == "module":
        return _scores(role, x, tensors, routing, (adapter, f"{place.key}:{role}"), spec)
    # One router for a block: its first adapted linear runs first, scores, and leaves the scores to the others.
    # By adapter: two of them in one model may share a block, and each has routers of its own.
    block = f"{place.scope_key(gate.scope)}:"
    key = (adapter, f"{block}{role}")
    if place.owns_router:
        _forget_others(routing, adapter, block)
        routing.scores[key] = _scores(role, x, tensors, routing, key, spec)
    return routing.scores[key]


def _forget_others(routing: Routing, adapter: str, block: str) -> None:
    """Drop the scores of blocks that ran before."""
    # They hold the graph that they came from: of each recomputed layer what it made again, up to the next pass.
    for key in [key for key in routing.scores if key[0] == adapter and not key[1].startswith(block)]:
        del routing.scores[key]


def _scores(role: str, x: Tensor, tensors: dict[str, Tensor], routing: Routing, key: Key, spec: LinearSpec) -> Tensor:
    gate = spec.gate(role)
    assert gate is not None
    if gate.input == "none":
        # One row of logits that broadcasts over all tokens.
        return tensors[f"mixture_logits_{role}"]
    if gate.input == "span":
        return _span_scores(tensors.get(f"mixture_logits_{role}"), x, routing, spec.counts[role])
    if gate.select == "fixed":
        # The row's number is the choice; an embedding has nothing to add.
        return _one_hot(_known_tasks(x, routing, spec), spec.counts[role], x)
    if gate.input == "task" or gate.reads_x:  # the latter beside the product that u holds
        return _task_scores(x, tensors, routing, spec)
    router = Router(
        tensors[f"mixture_router_{role}"], tensors.get(f"mixture_bias_{role}"), tensors.get(f"mixture_out_{role}")
    )
    return router.scores(gate, _what_is_read(gate, x, routing), routing, key)


def _what_is_read(gate: Gate, x: Tensor, routing: Routing) -> Tensor:
    if gate.input == "external":
        if routing.external is None:
            raise ValueError("this adapter reads a vector of each row: pass external=(batch, width) to the model")
        vector = _for_rows(routing.external.to(x.device), x)
        # (B, 1, W) for x (B, T, D): the same at each of the row's tokens.
        return vector.view(vector.shape[0], *([1] * (x.dim() - 2)), vector.shape[1])
    if gate.input == "hidden":
        # States of another text, left from an earlier call, could broadcast over this one without a word.
        # A mean over the prompt is known while its answer is written, and is what is taken.
        is_known = gate.is_averaged and routing.is_decoding
        if routing.hidden is None or (routing.hidden.shape[:-1] != x.shape[:-1] and not is_known):
            raise ValueError("this adapter reads the hidden states of a first pass: run it inside its PEFT model")
        return routing.hidden
    return x


def _known_tasks(x: Tensor, routing: Routing, spec: LinearSpec) -> Tensor:
    return _for_rows(routing.tasks_among(spec.num_tasks).to(x.device), x)


def _for_rows(values: Tensor, x: Tensor) -> Tensor:
    """Return one value for each row of x, where beam search made several rows of each."""
    # transformers repeats rows in place, so that a row's copies are neighbours. Numbers that do not divide are no
    # beams: they fail below, by shape.
    rows, known = x.shape[0], values.shape[0]
    if rows == known or rows % known:
        return values
    return values.repeat_interleave(rows // known, 0)


def _task_scores(x: Tensor, tensors: dict[str, Tensor], routing: Routing, spec: LinearSpec) -> Tensor:
    index = _known_tasks(x, routing, spec)
    table = tensors["mixture_task_embedding"]
    # Gates are float32 even under autocast: near ties, 16 bits would choose another expert.
    with ops.unlowered(table):
        logits = F.linear(ops.wide(table[index]), ops.wide(tensors["mixture_router_task"]))
    return logits.view(logits.shape[0], *([1] * (x.dim() - 2)), logits.shape[1])


def _span_scores(table: Tensor | None, x: Tensor, routing: Routing, num_experts: int) -> Tensor:
    """Return (B, T, E): each token's row of the table by its mark, or the mark's own expert; all -inf at mark 0."""
    marks = _marks(x, routing, num_experts)
    if table is None:
        experts = torch.arange(1, num_experts + 1, device=x.device)
        return torch.where(marks.unsqueeze(-1) == experts, 0.0, -torch.inf)
    rows = ops.wide(table)[(marks - 1).clamp_min(0)]
    return torch.where((marks > 0).unsqueeze(-1), rows, torch.full_like(rows, -torch.inf))


def _marks(x: Tensor, routing: Routing, num_experts: int) -> Tensor:
    """Return the mark of each token of x, (B, T); of an answer that is written, the one it is written under."""
    told, answer = routing.marks_among(num_experts), routing.answer_mark
    if routing.is_decoding and answer is not None:
        told = answer.unsqueeze(-1).expand(-1, x.shape[1])
    marks = _for_rows(told.to(x.device), x)
    if marks.shape != x.shape[:2]:
        raise ValueError(f"marks of {tuple(marks.shape)} tokens, and the text has {tuple(x.shape[:2])}")
    return marks


def _one_hot(index: Tensor, num_experts: int, x: Tensor) -> Tensor:
    """Return 0 at the row's own expert and -inf elsewhere: the softmax of it is exactly one-hot."""
    logits = torch.full((len(index), num_experts), -torch.inf, device=index.device)
    logits.scatter_(1, index.unsqueeze(1), 0.0)
    return logits.view(len(index), *([1] * (x.dim() - 2)), num_experts)


__all__ = ["given_logits", "is_given"]
