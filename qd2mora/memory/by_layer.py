"""Layer by layer: the micro batches of a step take turns in each decoder layer, and not in the whole model.

So a streamed layer is fetched once for all of them in either direction, and not once for each. Every micro batch goes
through the same operations, on tensors of its own length, as it would alone, and each parameter's gradient adds up in
the order of the micro batches: not a bit changes. What stays of a micro batch is what recomputing keeps, the input of
each layer (on the host where these leave); besides, its last states, and then their gradient, wait for the others'.

The decoder itself makes what comes before its layers and after them. It runs twice a micro batch with stand-ins in the
layers' places: first they note what it gives to each layer, later they give it the last states for the loss.

Source: layered gradient accumulation (Lamy-Poirier, arXiv 2106.02679), there for what goes over a network, here for
what goes over the bus.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from qd2mora.base.passes import device_of, last_states
from qd2mora.memory.checkpointing import decoder_layers
from qd2mora.mixture import read_rows, routing_of


@dataclass
class _Slot:
    """Where the gradient of a micro batch's states waits for the layer before."""

    gradient: Tensor | None = None

    def take(self) -> Tensor:
        taken, self.gradient = self.gradient, None
        assert taken is not None
        return taken


@dataclass
class _Turns:
    """One micro batch: its states after the layers so far, what the decoder gives to each, and where to go back in."""

    states: Tensor
    given: list[dict[str, Any]]
    routed: dict[str, object]
    slot: _Slot = field(default_factory=_Slot)
    ends: list[GradientEdge | None] = field(default_factory=list)
    """Of each layer's graph; none below the first adapter."""

    @property
    def is_learned(self) -> bool:
        """Whether a gradient is wanted of its states."""
        return bool(self.ends) and self.ends[-1] is not None


class LayerByLayer:
    """Runs micro batches of a step through a model whose decoder layers are all recomputed; for one step."""

    def __init__(self, model: PeftModel) -> None:
        self.model, self.layers = model, list(decoder_layers(model.get_base_model()))
        self._routing = routing_of(model)
        self._micro_batches: list[_Turns] = []
        # What a graph begins at where its states are cut off from the layer before.
        self._learned = torch.zeros((), device=device_of(model), requires_grad=True)

    def read(self, batch: Mapping[str, Tensor]) -> None:
        """Take a collated micro batch, of whose keys and shares the routers have been told, up to the first layer."""
        read_rows(self.model, batch)
        stand_ins = [_Noting() for _ in self.layers]
        with self._in_place_of_layers(stand_ins):
            last_states(self.model, batch)
        states = stand_ins[0].states
        assert states is not None
        # After the pass: what the decoder's hook has learned of the text is this micro batch's own.
        routed = {} if self._routing is None else self._routing.told()
        self._micro_batches.append(_Turns(states, [each.given for each in stand_ins], routed))

    def forward(self) -> None:
        """Run every layer on all micro batches in turn, keeping what its backward pass needs."""
        for index, layer in enumerate(self.layers):
            for turns in self._micro_batches:
                with self._routed(turns):
                    self._run(layer, turns, turns.given[index])

    def _run(self, layer: nn.Module, turns: _Turns, given: dict[str, Any]) -> None:
        states = self._cut_off(turns)
        turns.states = states  # the one before is gone while the layer runs
        after = layer(states, **given)
        if isinstance(after, tuple):
            after = after[0]
        # The place in the graph, and not the tensor, whose memory is free once the next layer's input has left.
        turns.ends.append(get_gradient_edge(after) if after.requires_grad else None)
        turns.states = after.detach()

    def _cut_off(self, turns: _Turns) -> Tensor:
        """Return a micro batch's states at the beginning of a graph that leaves their gradient in its slot."""
        if not turns.is_learned:
            return turns.states
        states: Tensor = _Beginning.apply(self._learned, turns.states, turns.slot)
        return states

    @contextmanager
    def last_states_of(self, number: int) -> Iterator[None]:
        """Let the decoder give a micro batch's last states while the block runs, whatever it reads; run no layer."""
        turns = self._micro_batches[number]
        known = _Known(self._cut_off(turns))
        turns.states = known.states
        with self._in_place_of_layers([known for _ in self.layers]):
            yield
        turns.states = torch.empty(0)  # the loss is through: only their gradient is still wanted

    def backward(self) -> None:
        """Go back through every layer, the last first, on all micro batches in turn; their losses have been through."""
        for _ in self.layers:
            for turns in self._micro_batches:
                end = turns.ends.pop()
                if end is None:
                    continue
                with self._routed(turns):
                    torch.autograd.backward([end], [turns.slot.take()])

    def _routed(self, turns: _Turns) -> AbstractContextManager[None]:
        return nullcontext() if self._routing is None else self._routing.within(turns.routed)

    @contextmanager
    def _in_place_of_layers(self, stand_ins: Sequence[nn.Module]) -> Iterator[None]:
        decoder: Any = self.model.get_base_model()
        decoder = decoder.get_decoder()
        layers, decoder.layers = decoder.layers, nn.ModuleList(stand_ins)
        try:
            yield
        finally:
            decoder.layers = layers


class _Noting(nn.Module):
    """Stands in a layer's place: notes what it is given, and returns its input."""

    def __init__(self) -> None:
        super().__init__()
        self.states: Tensor | None = None
        self.given: dict[str, Any] = {}

    def forward(self, states: Tensor, **given: Any) -> Tensor:
        self.states, self.given = states, given
        return states


class _Known(nn.Module):
    """Stands in a layer's place where its states are known."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, states: Tensor, **given: Any) -> Tensor:
        return self.states


class _Beginning(torch.autograd.Function):
    """States at which a graph begins: their gradient goes to `slot`, and no leaf holds on to the states for it."""

    @staticmethod
    def forward(ctx: Any, learned: Tensor, states: Tensor, slot: _Slot) -> Tensor:
        ctx.slot = slot
        return states.view_as(states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.slot.gradient = gradient
        return None, None, None


__all__ = ["LayerByLayer"]
