"""Scores that do not come out of a linear's one product: read from the task, a row's vector, a first pass, or a block.

What a router reads over many tokens is averaged over the prompt alone (`sequence`) or over the tokens so far
(`prefix`), so that no answer leaks into its own routing; while decoding the prompt's average stays as it was.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from qd2mora.mixture import ops
from qd2mora.mixture.method import Gate
from qd2mora.mixture.routing import Routing
from qd2mora.mixture.spec import LinearSpec


def given_logits(
    role: str, x: Tensor, tensors: dict[str, Tensor], routing: Routing, adapter: str, spec: LinearSpec
) -> Tensor | None:
    """Return logits that broadcast to (..., E), or None where the step finds all it needs in u.

    Raises ValueError where the pass does not say what the gate reads: the task, the vector, the prompt.
    """
    gate, place = spec.gate(role), spec.place
    assert gate is not None
    if gate.input in ("z", "self") or (gate.reads_x and gate.input == "x"):
        return None
    if gate.scope == "module":
        return _scores(role, x, tensors, routing, (adapter, f"{place.key}:{role}"), spec)
    key = (adapter, f"{place.scope_key(gate.scope)}:{role}")
    if place.owns_router:
        routing.shared_logits[key] = _scores(role, x, tensors, routing, key, spec)
    shared = routing.shared_logits[key]
    is_cut_off = torch.is_grad_enabled() and tensors["mixture_A"].requires_grad and not shared.requires_grad
    if gate.scope == "model" and is_cut_off and gate.select != "fixed":
        raise ValueError("one router serves the model: recomputing layers needs use_reentrant=False to reach it")
    return shared


def _scores(
    role: str, x: Tensor, tensors: dict[str, Tensor], routing: Routing, key: tuple[str, str], spec: LinearSpec
) -> Tensor:
    gate = spec.gate(role)
    assert gate is not None
    if gate.input == "none":
        return tensors[f"mixture_logits_{role}"]
    if gate.select == "fixed":
        return _one_hot(_known_tasks(x, routing, spec), spec.counts[role], x)
    if gate.input == "task":
        return _task_scores(x, tensors, routing, spec)
    if gate.reads_x:
        return _task_scores(x, tensors, routing, spec)  # beside the product that u holds
    with ops.unlowered(x):
        read = ops.wide(_what_is_read(gate, x, routing))
        scores = F.linear(read, ops.wide(tensors[f"mixture_router_{role}"]))
        if gate.is_averaged:
            scores = _averaged(gate, scores, routing, key)
        return ops.finish_scores(gate, scores, tensors.get(f"mixture_bias_{role}"), tensors.get(f"mixture_out_{role}"))


def _what_is_read(gate: Gate, x: Tensor, routing: Routing) -> Tensor:
    if gate.input == "external":
        if routing.external is None:
            raise ValueError("this adapter reads a vector of each row: pass external=(batch, width) to the model")
        vector = _for_rows(routing.external.to(x.device), x)
        return vector.view(vector.shape[0], *([1] * (x.dim() - 2)), vector.shape[1])
    if gate.input == "hidden":
        if routing.hidden is None or routing.hidden.shape[:-1] != x.shape[:-1]:
            raise ValueError("this adapter reads the hidden states of a first pass: run it inside its PEFT model")
        return routing.hidden
    return x


def _averaged(gate: Gate, scores: Tensor, routing: Routing, key: tuple[str, str]) -> Tensor:
    if gate.granularity == "sequence":
        if routing.is_decoding:
            return routing.pools[key][0]
        prompt = routing.prompt
        if prompt is None:
            if not routing.keeps_pools:
                raise ValueError(
                    "this adapter routes by the prompt: pass labels or prompt_mask=(batch, length) to the model"
                )
            prompt = routing.counted(scores).bool()
        mean = ops.average(scores, prompt.to(scores.device), "sequence")
        if routing.keeps_pools:
            routing.pools[key] = (mean.detach(), mean.new_ones(()))
        return mean
    counted = routing.counted(scores).to(scores.dtype).unsqueeze(-1)
    summed, number = (scores * counted).cumsum(-2), counted.cumsum(-2)
    if routing.is_decoding:
        before = routing.pools[key]
        summed, number = summed + before[0], number + before[1]
    if routing.keeps_pools:
        routing.pools[key] = (summed[:, -1:].detach(), number[:, -1:])
    return summed / number.clamp_min(1)


def _known_tasks(x: Tensor, routing: Routing, spec: LinearSpec) -> Tensor:
    return _for_rows(routing.tasks_among(spec.num_tasks).to(x.device), x)


def _for_rows(values: Tensor, x: Tensor) -> Tensor:
    """Return one value for each row of x, where beam search made several rows of each."""
    rows, known = x.shape[0], values.shape[0]
    return values if rows == known or rows % known else values.repeat_interleave(rows // known, 0)


def _task_scores(x: Tensor, tensors: dict[str, Tensor], routing: Routing, spec: LinearSpec) -> Tensor:
    index = _known_tasks(x, routing, spec)
    table = tensors["mixture_task_embedding"]
    with ops.unlowered(table):
        logits = F.linear(ops.wide(table[index]), ops.wide(tensors["mixture_router_task"]))
    return logits.view(logits.shape[0], *([1] * (x.dim() - 2)), logits.shape[1])


def _one_hot(index: Tensor, num_experts: int, x: Tensor) -> Tensor:
    """Return 0 at the row's own expert and -inf elsewhere: the softmax of it is exactly one-hot."""
    logits = torch.full((len(index), num_experts), -torch.inf, device=index.device)
    logits.scatter_(1, index.unsqueeze(1), 0.0)
    return logits.view(len(index), *([1] * (x.dim() - 2)), num_experts)


__all__ = ["given_logits"]
