"""Scores that do not come out of a linear's one product: of the task, a row's vector, a first pass, or a block.

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

    Raises ValueError where the pass does not say what the gate reads: the task, the vector, the prompt.
    """
    gate, place = spec.gate(role), spec.place
    assert gate is not None
    if gate.scope == "module":
        return _scores(role, x, tensors, routing, (adapter, f"{place.key}:{role}"), spec)
    # One router for a block: its first adapted linear runs first, scores, and leaves the scores to the others.
    # By adapter: two of them in one model may share a block, and each has routers of its own.
    key = (adapter, f"{place.scope_key(gate.scope)}:{role}")
    if place.owns_router:
        routing.scores[key] = _scores(role, x, tensors, routing, key, spec)
    return routing.scores[key]


def _scores(role: str, x: Tensor, tensors: dict[str, Tensor], routing: Routing, key: Key, spec: LinearSpec) -> Tensor:
    gate = spec.gate(role)
    assert gate is not None
    if gate.input == "none":
        # One row of logits that broadcasts over all tokens.
        return tensors[f"mixture_logits_{role}"]
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


def _one_hot(index: Tensor, num_experts: int, x: Tensor) -> Tensor:
    """Return 0 at the row's own expert and -inf elsewhere: the softmax of it is exactly one-hot."""
    logits = torch.full((len(index), num_experts), -torch.inf, device=index.device)
    logits.scatter_(1, index.unsqueeze(1), 0.0)
    return logits.view(len(index), *([1] * (x.dim() - 2)), num_experts)


__all__ = ["given_logits", "is_given"]
