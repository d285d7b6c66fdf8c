"""What a run is at a step: the trainable tensors, the optimiser's moments by parameter name, and a few numbers.

`StateSource` is where a checkpoint's content comes from and goes to. `LocalState` is the plain one; an engine that
shards parameters or moments over processes brings its own, whose `collect` gathers the small trainable state on every
process, so that the engine's own (pickled) checkpoints are never needed.
"""

import copy
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qd2mora.disk.tensor_file import Inventory, inventory_of


@dataclass
class Progress:
    """How far a run is; `step` counts data positions, `applied` the updates among them."""

    step: int = 0
    applied: int = 0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    micro_batch: int | None = None
    """Rows in a forward pass, where memory forced it below the plan."""
    loss_scale: float | None = None
    """Factor on the loss where gradients are float16."""
    applied_at_scale: int = 0
    best: dict[str, list[Any]] = field(default_factory=dict)
    """Step, value and what it is, of the best evaluation of each task and of the whole (see `best`)."""
    stale: int = 0
    """Evaluations since the last that was the best overall."""


@dataclass(frozen=True)
class State:
    """Everything that continues a run. Tensors are on the CPU."""

    adapter: dict[str, Tensor]
    moments: dict[str, Tensor]
    scalars: dict[str, Any]
    progress: Progress = field(default_factory=Progress)


class StateSource(Protocol):
    """Gives and takes the trainable state; every method is called on every process."""

    def collect(self, *, copied: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """Return adapter, moments and scalars on the CPU, `copied` where training goes on meanwhile."""

    def restore(self, state: State) -> None:
        """Put a state back."""

    def expected(self) -> tuple[Inventory, Inventory]:
        """Return what adapter and moments should hold: name to dtype and shape."""


@dataclass(frozen=True)
class LocalState:
    """All of the state in this process; `parameters` in the order in which the optimiser has them.

    `moved` changes while training goes on without being trained: the selection biases of routers.
    """

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    moved: dict[str, nn.Parameter] = field(default_factory=dict)

    def collect(self, *, copied: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """See StateSource."""
        flat: dict[str, Any] = {}
        state = self.optimizer.state_dict()["state"]
        for index, name in enumerate(self.parameters):
            _flatten(state.get(index, {}), name, flat)
        moments = {key: value for key, value in flat.items() if isinstance(value, Tensor)}
        scalars = {key: value for key, value in flat.items() if key not in moments}
        adapter = {name: parameter.detach() for name, parameter in (self.parameters | self.moved).items()}
        return _on_cpu(adapter, copied), _on_cpu(moments, copied), scalars

    def restore(self, state: State) -> None:
        """See StateSource."""
        with torch.no_grad():
            for name, parameter in (self.parameters | self.moved).items():
                parameter.copy_(state.adapter[name])
        position = {name: index for index, name in enumerate(self.parameters)}
        nested: dict[int, dict[str, Any]] = {}
        for key, value in (state.moments | state.scalars).items():
            name, *path = key.split("::")
            node = nested.setdefault(position[name], {})
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = value
        self.optimizer.load_state_dict({"state": nested, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def expected(self) -> tuple[Inventory, Inventory]:
        """See StateSource. Optimisers make their moments at the first update, so an empty one is done, and undone."""
        kept = {parameter: copy.deepcopy(state) for parameter, state in self.optimizer.state.items()}
        rates = [group["lr"] for group in self.optimizer.param_groups]
        before = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(before[name])
        adapter, moments, _ = self.collect(copied=False)
        inventories = inventory_of(adapter), inventory_of(moments)
        # What is left of it would count as an update where no checkpoint takes its place.
        self.optimizer.state.clear()
        self.optimizer.state.update(kept)
        return inventories


def owner_of(moment: str) -> str:
    """Return the parameter that a moment belongs to."""
    return moment.partition("::")[0]


def _flatten(value: Any, path: str, into: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, child in value.items():
            _flatten(child, f"{path}::{key}", into)
    else:
        into[path] = value


def _on_cpu(tensors: dict[str, Tensor], copied: bool) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=copied).contiguous() for name, tensor in tensors.items()}


__all__ = ["LocalState", "Progress", "State", "StateSource", "owner_of"]
