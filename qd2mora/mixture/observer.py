"""What a linear does with its gates in the backward pass: add penalties, count who was used, steer a sampling router.

The step in rank space is done again there, once for each micro batch, whatever is checkpointed: so a penalty's gradient
is exact, nothing is counted twice, and the forward pass costs nothing more.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qd2mora.mixture import balance
from qd2mora.mixture.fused import FusedCall
from qd2mora.mixture.routing import Routing
from qd2mora.mixture.spec import LinearSpec
from qd2mora.routed import ops
from qd2mora.routed.routers import Gating, log_probability


@dataclass(frozen=True)
class Observer:
    """Looks at one linear's gates of one micro batch."""

    spec: LinearSpec
    routing: Routing
    adapter: str
    counted: Tensor
    group: Tensor | None
    task: Tensor | None
    better: Tensor | None

    @classmethod
    def of(cls, spec: LinearSpec, routing: Routing, adapter: str | None, x: Tensor) -> "Observer | None":
        """Return an observer where there is anything to see; no adapter: outside training."""
        # Without rows and tokens (x of two axes) there is no batch that a penalty could be a mean over.
        random = any(gate.select == "sample" for _, gate in spec.step.gates)
        counts = routing.phase.sparsity is not None or any(gate.has_moved_bias for _, gate in spec.step.gates)
        if adapter is None or not (spec.penalties or counts or random) or x.dim() != 3:
            return None
        group, task = routing.group, routing.task_index
        if routing.segments is not None:
            group = task = None  # a line of packed rows is no row
        if group is not None:
            group = group.to(x.device)
        if task is not None:
            task = task.to(x.device)
        return cls(spec, routing, adapter, routing.counted(x), group, task, routing.better)

    def __call__(self, gatings: Mapping[str, Gating]) -> Tensor | None:
        """Return what to add to the loss, already weighed and scaled; None where nothing is."""
        terms = []
        for role, gating in gatings.items():
            gate = self.spec.gate(role)
            assert gate is not None
            if gate.has_moved_bias or (self.routing.phase.sparsity is not None and gate.select == "top_k"):
                # Counted here and not in the forward pass, which recomputing layers runs twice.
                used = gating.used.detach() * self.counted.to(gating.probs.dtype).unsqueeze(-1)
                self.routing.add_counts((self.adapter, f"{self.spec.place.key}:{role}"), used.flatten(0, -2).sum(0))
            if gate.select == "sample" and self.routing.advantage is not None:
                terms.append(self._policy(gating, gate.temperature))
            # A router that several linears share is punished once, where it stands.
            if gate.scope == "module" or self.spec.place.owns_router:
                terms += [self._penalty(gating, number) for number in range(len(self.spec.penalties))]
        if not terms:
            return None
        total = torch.stack(terms).sum()
        # A router that is not trained, or has nothing to learn, gives a value without a gradient.
        return total if total.requires_grad else None

    def _penalty(self, gating: Gating, number: int) -> Tensor:
        penalty = self.spec.penalties[number]
        by_row = penalty.over == "row" or penalty.kind in balance.BY_ROW
        needed = {"localized_balance": ("group", self.group), "router_ce": ("task_index", self.task)}
        needed["base_or_expert"] = ("better", self.better)
        name, ids = needed.get(penalty.kind, ("", self.counted))
        if ids is None:
            raise ValueError(f"the penalty {penalty.kind} needs {name}=(batch,) of the rows")
        of_row = ids if name == "better" else self.task
        seen = balance.view(gating, self.counted, by_row, self.group, of_row, self.routing.marks)
        if penalty.pool == "router":
            value = balance.PENALTIES[penalty.kind](seen, penalty).mean()
        else:
            layer = self.spec.place.layer if penalty.pool == "layer" else None
            means = self.routing.pool_of(self.adapter, layer, seen.probs.shape[-1], by_row)
            value = balance.pooled_value(penalty.kind, seen, penalty, means).mean()
        # A mean over rows counts by this micro batch's share of the step's rows, one over tokens by that of its tokens.
        of_tokens, of_rows = self.routing.share
        share = of_rows if by_row or seen.is_of_rows else of_tokens
        weighed = penalty.weight * self.routing.phase.penalty * share * value
        self.routing.add_value(penalty.kind, weighed.detach())
        return self.routing.loss_scale * weighed

    def _policy(self, gating: Gating, temperature: float) -> Tensor:
        """REINFORCE: the gradient of advantage times the log-probability of what was drawn, summed over tokens."""
        assert self.routing.advantage is not None
        logs = log_probability(gating, temperature) * self.counted.to(gating.probs.dtype)
        return (self.routing.advantage.to(logs.device).unsqueeze(-1) * logs).sum()


Pooling = Callable[[FusedCall, Tensor, dict[str, Tensor]], Callable[[Tensor, Tensor], None] | None]
"""Makes of a call, its x and what its step reads beside u what is to be shown u and v of the forward pass, or nothing.
"""


def pooling(
    spec: LinearSpec, routing: Routing, adapter: str | None, call: FusedCall, x: Tensor, small: dict[str, Tensor]
) -> Callable[[Tensor, Tensor], None] | None:
    """Return what leaves a linear's decisions in a forward pass of training for penalties that pool routers."""
    if adapter is None or not spec.pools or x.dim() != 3:
        return None

    def leave(u: Tensor, v: Tensor) -> None:
        with torch.no_grad():
            pool(spec, routing, adapter, x, call.step.route(ops.wide(u), small, call.draws)[1])

    return leave


def pool(spec: LinearSpec, routing: Routing, adapter: str, x: Tensor, gatings: Mapping[str, Gating]) -> None:
    """Leave the means of what routers decided, by place: layers that are recomputed come by again, and decide the same.

    A router that several linears share is one, where it stands.
    """
    counted = routing.counted(x)
    for role, gating in gatings.items():
        gate = spec.gate(role)
        assert gate is not None
        if gate.scope == "module" or spec.place.owns_router:
            key = (adapter, f"{spec.place.key}:{role}")
            routing.pooled[key] = (spec.place.layer, balance.Pooled.of(gating, counted))


__all__ = ["Observer", "Pooling", "pool", "pooling"]
