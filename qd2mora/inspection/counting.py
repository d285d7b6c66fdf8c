"""Watching routers while rows run through a model in evaluation: sums by router and task, a few numbers each.

Each watched linear's scores are computed once more before its own forward pass, which costs its product down and a step
in rank space. Nothing of the model changes, no random number is drawn, and padding never counts; gates of a whole row
count once a row.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qd2mora.inspection.measures import COLLAPSED, RouterMeasures, measure, token_sums, width
from qd2mora.mixture import MixtureLinear, Routing, mixture_layers, routing_of
from qd2mora.routed.gate import Gate
from qd2mora.routed.routers import Gating


@dataclass
class RouterSums:
    """One router: the linear it stands at, what it gates, and its sums (tasks, width) float64."""

    module: str
    layer: int
    kind: str
    role: str
    gate: Gate
    num_experts: int
    num_tasks: int
    sums: Tensor | None = None

    @property
    def at_once(self) -> int:
        """Experts that a token uses at least."""
        if self.gate.select in ("top_k", "sample", "entropy"):
            return min(self.gate.top_k or 1, self.num_experts)
        return 1

    @property
    def is_sparse(self) -> bool:
        """Whether it leaves experts out."""
        is_all = self.gate.select in ("top_k", "sample") and self.at_once == self.num_experts
        return self.gate.select != "all" and not is_all

    @property
    def chooses(self) -> bool:
        """Whether there is a choice that could collapse: no static weights, no expert given by the task's number."""
        return self.num_experts > self.at_once and self.gate.select != "fixed" and self.gate.input != "none"

    def add(self, gating: Gating, counted_BT: Tensor, task_B: Tensor) -> None:
        """Add a batch: gating (B, n, E) or what broadcasts to it."""
        num_rows, num_places = counted_BT.shape[0], 1
        # Some routers weigh with signs; what is counted is how much of an expert is used.
        gates, chosen, counted = gating.weight.detach().abs().float(), None, counted_BT
        if gates.dim() > 1:
            num_places = gates.shape[-2]
        if num_places != counted_BT.shape[1]:  # gates of whole rows, or of all of them
            counted = counted_BT.new_ones(num_rows, 1)
        shape = (num_rows, num_places, self.num_experts)
        if gating.chosen is not None and self.is_sparse:
            chosen = gating.chosen.float().expand(shape)
        by_row = token_sums(gates.expand(shape), chosen, counted.float()).double()
        # float64 from here on: a run's tokens are too many for float32 sums to stay whole.
        of_task = nn.functional.one_hot(task_B.to(by_row.device), self.num_tasks).double()
        added = of_task.T @ by_row
        if self.sums is not None:
            added = self.sums + added
        self.sums = added

    def measured(self) -> RouterMeasures | None:
        """Return its measures, None where it saw no token."""
        if self.sums is None or not bool((self.sums[:, 0] > 0).any()):
            return None
        return measure(self.sums.cpu(), self.is_sparse, self.at_once)

    def is_collapsed(self, measures: RouterMeasures) -> bool:
        """Tell whether nearly all of its load is on as few experts as a token uses anyway."""
        return self.chooses and measures.top_share >= COLLAPSED


@dataclass
class RoutingWatch:
    """The routers of one adapter, and their sums since `start`.

    asks_all: a head asks every expert of each row (`objective.head: experts`), so that no router decides anything, and
    none is watched.
    """

    model: nn.Module
    num_tasks: int
    adapter: str = "default"
    asks_all: bool = False
    routers: dict[tuple[str, str], RouterSums] = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Forget all sums."""
        self.routers = {}
        for name, layer in mixture_layers(self.model).items():
            spec = layer.mixture_spec.get(self.adapter)
            if spec is None or self.asks_all:
                continue
            for role, gate in spec.step.gates:
                # A router that several linears share is counted once, where it stands.
                if gate.scope == "module" or spec.place.owns_router:
                    where = (spec.place.layer, spec.place.kind, role)
                    self.routers[name, role] = RouterSums(name, *where, gate, spec.counts[role], self.num_tasks)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what runs through the model while the block lasts, in evaluation mode, without gradients."""
        layers, routing = mixture_layers(self.model), routing_of(self.model)
        names = {name for name, _ in self.routers}
        handles = [layers[name].register_forward_pre_hook(self._hook(name, routing)) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def reduce(self, add_up: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Add up the sums of all processes: `add_up` takes and gives one vector."""
        routers = list(self.routers.values())
        shapes = [(router.num_tasks, width(router.num_experts)) for router in routers]
        if not routers:
            return
        flat = []
        for router, shape in zip(routers, shapes, strict=True):
            sums = router.sums
            if sums is None:  # this process may have had no row
                sums = torch.zeros(shape, dtype=torch.float64)
            flat.append(sums.to(device).flatten())
        # One message for all routers.
        parts = add_up(torch.cat(flat)).split([len(part) for part in flat])
        for router, part, shape in zip(routers, parts, shapes, strict=True):
            router.sums = part.view(shape)

    def _hook(self, name: str, routing: Routing | None) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, MixtureLinear) and routing is not None
            if not layer.disable_adapters and routing.task_index is not None:  # disabled: a first pass
                self._see(name, layer.gatings(inputs[0], self.adapter), routing, inputs[0])

        return before

    def _see(self, name: str, gatings: Mapping[str, Gating], routing: Routing, x: Tensor) -> None:
        assert routing.task_index is not None
        counted = routing.counted(x)
        for role, gating in gatings.items():
            if (name, role) in self.routers:
                inside = counted
                if gating.used.shape[:-1] == counted.shape:
                    inside = counted * (gating.used.sum(-1) > 0)  # a token in no span uses no expert
                self.routers[name, role].add(gating, inside, routing.task_index)


__all__ = ["RouterSums", "RoutingWatch"]
