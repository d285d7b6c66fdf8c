"""Who updates what is trained, the plain optimiser or an engine (`zero`), behind one protocol; and at what rate.

The loop never asks which it is: it has a step's whole gradient in the parameters' `grad`, and hands it over.
"""

import copy
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qd2mora.disk.tensor_file import Inventory, inventory_of
from qd2mora.mixture import routing_of
from qd2mora.mixture.parts import part_of
from qd2mora.mixture.phases import PLAIN, Phase, Sparsity
from qd2mora.recipe import Train
from qd2mora.recipe.optimizers import OPTIMIZERS, OptimizerName
from qd2mora.training.progress import State, StateSource


class Updater(StateSource, Protocol):
    """Turns gradients into new parameters; every method is called on every process."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable ones, by name."""

    @property
    def shares_weights(self) -> bool:
        """Whether a pass gathers weights from all processes, which then have to run as many passes, in step."""

    @property
    def shares_moments(self) -> bool:
        """Whether this process holds but a part of the moments."""

    @property
    def has_moments(self) -> bool:
        """Whether there are moments yet; the first update makes them."""

    def moments_of(self, parameter: Tensor) -> list[Tensor]:
        """Return the moments that have the parameter's shape, to be changed in place."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of the parameters."""

    def update(self, learning_rate: float) -> None:
        """Update the parameters with their gradients."""

    def forget_gradients(self) -> None:
        """Let go of gradients, used or not to be used."""

    def refuse_again(self) -> None:
        """Raise WillNotFit where a pass that ran out of memory cannot be done again by this process alone."""


@dataclass(frozen=True)
class PlainUpdater:
    """All of it in this process; `parameters` in the order in which the optimiser has them.

    `moved` changes while training goes on without being trained: the selection biases of routers. `frozen` is what the
    first entries of some parameters stay: experts that were there before others were added.
    """

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    moved: dict[str, nn.Parameter] = field(default_factory=dict)
    frozen: dict[str, Tensor] = field(default_factory=dict)
    shares_weights: bool = False
    shares_moments: bool = False

    @property
    def has_moments(self) -> bool:
        return bool(self.optimizer.state)

    def moments_of(self, parameter: Tensor) -> list[Tensor]:
        state = self.optimizer.state.get(parameter, {}).values()
        return [moment for moment in state if isinstance(moment, Tensor) and moment.shape == parameter.shape]

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, learning_rate: float) -> None:
        # Set at every step, from the step's number: a scheduler of torch's would have a state to save.
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("factor", 1.0)  # an optimiser made elsewhere has none
        self.optimizer.step()
        # They have no gradient, but weight decay moves them all the same, and blocks of 8-bit moments reach over.
        with torch.no_grad():
            for name, kept in self.frozen.items():
                self.parameters[name][: len(kept)].copy_(kept)

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def refuse_again(self) -> None:
        """See Updater; a plain one has no reason to refuse."""

    def collect(self, *, copied: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, object]]:
        flat: dict[str, object] = {}
        state = self.optimizer.state_dict()["state"]
        for index, name in enumerate(self.parameters):
            _flatten(state.get(index, {}), name, flat)
        moments = {key: value for key, value in flat.items() if isinstance(value, Tensor)}
        scalars = {key: value for key, value in flat.items() if key not in moments}
        adapter = {name: parameter.detach() for name, parameter in (self.parameters | self.moved).items()}
        return _on_cpu(adapter, copied), _on_cpu(moments, copied), scalars

    def restore(self, state: State) -> None:
        with torch.no_grad():
            for name, parameter in (self.parameters | self.moved).items():
                parameter.copy_(state.adapter[name])
        position = {name: index for index, name in enumerate(self.parameters)}
        nested: dict[int, dict[str, object]] = {}
        for key, value in (state.moments | state.scalars).items():
            name, *path = key.split("::")
            _put(nested.setdefault(position[name], {}), path, value)
        # Groups as they are now: the rate is a function of the step, and a resume may have been given another.
        self.optimizer.load_state_dict({"state": nested, "param_groups": self.optimizer.state_dict()["param_groups"]})
        page_again(self.optimizer)

    def expected(self) -> tuple[Inventory, Inventory]:
        """See StateSource. Optimisers make their moments at the first update, so an empty one is done, and undone."""
        # Asked of the optimiser itself: which moments it keeps, in which dtype, is its own business (8-bit ones, by
        # size).
        earlier = {parameter: copy.deepcopy(state) for parameter, state in self.optimizer.state.items()}
        rates = [group["lr"] for group in self.optimizer.param_groups]
        before = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        # Gradients of zero at a rate of zero: moments appear, and weights move by rounding at most, which is put back.
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self.update(0.0)
        self.forget_gradients()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(before[name])
        adapter, moments, _ = self.collect(copied=False)
        inventories = inventory_of(adapter), inventory_of(moments)
        # What is left of it would count as an update where no checkpoint takes its place.
        self.optimizer.state.clear()
        self.optimizer.state.update(earlier)
        return inventories


def page_again(optimizer: torch.optim.Optimizer) -> None:
    """Put moments that were loaded into managed memory, where a paged optimiser keeps those it made itself.

    bitsandbytes 0.50 loads a state onto the device of its parameter, whatever the optimiser.
    """
    if not getattr(optimizer, "is_paged", False):
        return
    paged: Any = optimizer
    for parameter, state in paged.state.items():
        for key in ("state1", "state2"):
            if key in state:
                buffer = paged.get_state_buffer(parameter, dtype=state[key].dtype)
                buffer.copy_(state[key])
                state[key] = buffer


def build_optimizer(train: Train, name: OptimizerName, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Return an optimiser over the trainable parameters, in their order; neighbours of one rate are a group."""
    row = OPTIMIZERS[name]
    kind = row.kind(next(iter(parameters.values())).is_cuda)
    groups = [
        {"params": [parameters[each] for each in names], "lr": train.learning_rate * factor, "factor": factor}
        for factor, names in itertools.groupby(parameters, lambda each: rate_factor(train, each))
    ]
    built = kind(groups, lr=train.learning_rate, weight_decay=train.weight_decay, **row.options)
    assert isinstance(built, torch.optim.Optimizer)
    return built


def rate_factor(train: Train, parameter: str) -> float:
    """Return the multiple of the learning rate that a parameter has, by its name."""
    part = part_of(parameter)
    if train.rates is None or part is None:
        return 1.0
    factors = {"down": train.rates.down, "up": train.rates.up, "core": train.rates.core, "router": train.rates.router}
    return factors[part]


def by_rate(train: Train, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return parameters in an order that puts those of one rate together, so that an update has few groups."""
    return {name: parameters[name] for name in sorted(parameters, key=lambda each: rate_factor(train, each))}


def learning_rate(train: Train, update: int, total: int) -> float:
    """Return the rate of update number `update` (from 0) of `total`: linear warm-up, then the schedule down to zero."""
    if update < train.warmup_steps:
        # From the first step on above zero: a rate of 0 would take a step that learns nothing.
        return train.learning_rate * (update + 1) / train.warmup_steps
    progress = (update - train.warmup_steps) / max(1, total - train.warmup_steps)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[train.schedule]
    return train.learning_rate * factor


def phase_of(train: Train, update: int) -> Phase:
    """Return what routing is like in update number `update` (from 0)."""
    told = train.routing
    if told is None:
        return PLAIN
    temperature = penalty = 1.0
    if update < told.anneal_steps:
        # Geometric: the same factor at each step, and exactly 1 at the end.
        temperature = told.temperature ** (1 - update / told.anneal_steps)
    if update < told.penalty_steps:
        penalty = update / told.penalty_steps
    sparsity = None
    if told.top_k is not None:
        # To the end of the run, when it changes nothing any more: the load is told of those steps too.
        sparsity = Sparsity(told.top_k, update / told.top_k_steps, told.low_layers_later)
    return Phase(update < told.uniform_steps, temperature, penalty, sparsity)


def enter_phase(model: nn.Module, train: Train, update: int) -> None:
    """Tell the layers what routing is like in this update."""
    routing = routing_of(model)
    if routing is not None:
        routing.phase = phase_of(train, update)


def add_gradient(value: Tensor, of: Iterable[Tensor]) -> None:
    """Add the gradient of a value to that of those tensors which are trained; nothing else gets one."""
    trained = [tensor for tensor in of if tensor.requires_grad]
    # Not `backward`, which would add to every trained tensor on the way, asked for or not.
    gradients = torch.autograd.grad(value, trained, allow_unused=True)
    for tensor, gradient in zip(trained, gradients, strict=True):
        if gradient is None:
            continue
        if tensor.grad is None:
            tensor.grad = gradient
        else:
            tensor.grad.add_(gradient)


def _flatten(value: object, path: str, into: dict[str, object]) -> None:
    if isinstance(value, dict):
        for key, child in value.items():
            _flatten(child, f"{path}::{key}", into)
    else:
        into[path] = value


def _put(tree: dict[str, object], path: list[str], value: object) -> None:
    """Put a value where a path through nested dictionaries leads, making those that are not there."""
    first, *rest = path
    if not rest:
        tree[first] = value
        return
    branch = tree.setdefault(first, {})
    assert isinstance(branch, dict)
    _put(branch, rest, value)


def _on_cpu(tensors: dict[str, Tensor], copied: bool) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=copied).contiguous() for name, tensor in tensors.items()}


__all__ = [
    "PlainUpdater",
    "Updater",
    "add_gradient",
    "build_optimizer",
    "by_rate",
    "enter_phase",
    "learning_rate",
    "phase_of",
    "rate_factor",
]
