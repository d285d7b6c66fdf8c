"""What a linear does with its gates in the backward pass: add penalties, count who was used, steer a sampling router.

The step in rank space is done again there, once for each micro batch, whatever is checkpointed: so a penalty's gradient
is exact, nothing is counted twice, and the forward pass costs nothing more.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qd2mora.mixture import balance
from qd2mora.mixture.routers import Gating, log_probability
from qd2mora.mixture.routing import Routing
from qd2mora.mixture.spec import LinearSpec


@dataclass(frozen=True)
class Observer:
    """Looks at one linear's gates of one micro batch."""

    spec: LinearSpec
    routing: Routing
    adapter: str
    counted: Tensor
    group: Tensor | None
    task: Tensor | None

    @classmethod
    def of(cls, spec: LinearSpec, routing: Routing, adapter: str, x: Tensor) -> "Observer | None":
        """Return an observer where there is anything to see."""
        random = any(gate.select == "sample" for _, gate in spec.step.gates)
        counts = any(gate.bias_rate for _, gate in spec.step.gates)
        if not (spec.penalties or counts or random) or x.dim() != 3:
            return None
        of_rows = (None, None) if routing.segments is not None else (routing.group, routing.task_index)
        on = [None if ids is None else ids.to(x.device) for ids in of_rows]  # a line of packed rows is no row
        return cls(spec, routing, adapter, routing.counted(x), *on)

    def __call__(self, gatings: Mapping[str, Gating]) -> Tensor | None:
        """Return what to add to the loss, already weighed and scaled; None where nothing is."""
        terms = []
        for role, gating in gatings.items():
            gate = self.spec.gate(role)
            assert gate is not None
            if gate.bias_rate:
                used = gating.used.detach() * self.counted.to(gating.probs.dtype).unsqueeze(-1)
                self.routing.add_counts((self.adapter, f"{self.spec.place.key}:{role}"), used.flatten(0, -2).sum(0))
            if gate.select == "sample" and self.routing.advantage is not None:
                terms.append(self._policy(gating, gate.temperature))
            if gate.scope == "module" or self.spec.place.owns_router:
                terms += [self._penalty(gating, number) for number in range(len(self.spec.penalties))]
        total = torch.stack(terms).sum() if terms else None
        # A router that is not trained, or has nothing to learn, gives a value without a gradient.
        return total if total is not None and total.requires_grad else None

    def _penalty(self, gating: Gating, number: int) -> Tensor:
        penalty = self.spec.penalties[number]
        by_row = penalty.over == "row" or penalty.kind in balance.BY_ROW
        if penalty.kind in ("localized_balance", "router_ce") and (
            (self.group if penalty.kind == "localized_balance" else self.task) is None
        ):
            wanted = "group" if penalty.kind == "localized_balance" else "task_index"
            raise ValueError(f"the penalty {penalty.kind} needs {wanted}=(batch,) of the rows")
        seen = balance.view(gating, self.counted, by_row, self.group, self.task)
        value = balance.PENALTIES[penalty.kind](seen, penalty).mean()
        share = self.routing.share[1 if by_row or seen.is_of_rows else 0]
        weighed = penalty.weight * share * value
        self.routing.add_value(penalty.kind, weighed.detach())
        return self.routing.loss_scale * weighed

    def _policy(self, gating: Gating, temperature: float) -> Tensor:
        """REINFORCE: the gradient of advantage times the log-probability of what was drawn, summed over tokens."""
        assert self.routing.advantage is not None
        logs = log_probability(gating, temperature) * self.counted.to(gating.probs.dtype)
        return (self.routing.advantage.to(logs.device).unsqueeze(-1) * logs).sum()


__all__ = ["Observer"]
