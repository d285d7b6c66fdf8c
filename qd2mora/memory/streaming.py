"""Streaming: frozen weights live in host memory and visit the device layer by layer, so that two layers are there.

Each decoder layer's frozen tensors (packed 4-bit weights and block maxima) lie in one pinned host buffer and are copied
one way only, in one piece, into one of a few slots on the device. Layer i always takes slot i modulo their number, so a
weight is a view of its slot for good: what autograd kept of it is right again when the layer is back. While a layer
runs, the next one in the direction of the pass is copied on a stream of its own; a copy waits for all work given to
the device before it, so no slot is overwritten under a layer that still reads it.

Works with recomputed layers and without. On a CPU the slots are plain memory and copies are made at once: the same
order, the same reuse, the same bytes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qd2mora.memory.pinned import host_buffer

# One layer computes, the next arrives: a third slot would hold bytes and hide nothing more.
SLOTS = 2
ALIGNMENT = 256
"""Bytes that each tensor in a buffer starts at a multiple of, as the device's own allocator has it."""


def streamed_layers(num_layers: int, resident: int) -> list[int]:
    """Return which decoder layers visit the device where `resident` others stay there.

    Those that stay are spread evenly: while one computes nothing has to be copied, so a copy hides behind two layers.
    """
    stay = {(2 * number + 1) * num_layers // (2 * resident) for number in range(resident)}
    return [index for index in range(num_layers) if index not in stay]


class LayerStream:
    """Streams the frozen linears of decoder layers to a device; `copied` lists the layers copied, in order."""

    def __init__(self, layers: list[nn.Module], device: torch.device, num_slots: int = SLOTS) -> None:
        """Move the layers' frozen linears into host buffers and point their tensors at the slots.

        Whatever else the layers hold is left where it is.
        """
        self.device = device
        self.copied: list[int] = []
        self._on_gpu = device.type == "cuda"
        sizes = [sum(aligned(tensor.nbytes) for _, _, tensor in frozen_tensors(layer)) for layer in layers]
        self.slots = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(num_slots)]
        self._held: list[int | None] = [None] * num_slots
        self._stream: torch.cuda.Stream | None = None
        self._ready: list[torch.cuda.Event] = []
        if self._on_gpu:
            self._stream = torch.cuda.Stream(device)
            self._ready = [torch.cuda.Event() for _ in range(num_slots)]
        self._going_back: int | None = None
        self.hosts = [self._moved_out(index, layer, sizes[index]) for index, layer in enumerate(layers)]
        for index, layer in enumerate(layers):
            self._watch(index, layer)

    def bring(self, index: int, backward: bool) -> None:
        """Have a layer's weights in its slot before what the device is given next, and start on the layer after it."""
        self._start(index)
        # At layer 0 of a backward pass the next layer to run is layer 1 again, in the next forward pass.
        following = index + 1
        if backward and index:
            following = index - 1
        if following < len(self.hosts):
            self._start(following)
        # The device waits, not Python: the layer's kernels are queued behind the copy, and the next one is on its way.
        if self._on_gpu:
            torch.cuda.current_stream(self.device).wait_event(self._ready[index % len(self.slots)])

    def _start(self, index: int) -> None:
        slot, host = index % len(self.slots), self.hosts[index]
        # There already: where a forward pass turns into the backward one, the same two layers are wanted again.
        if self._held[slot] == index:
            return
        self._held[slot] = None  # until the copy is given to the device
        target = self.slots[slot][: host.nbytes]
        if self._stream is None:
            target.copy_(host)
        else:
            # The slot's last reader is among what the device was given so far. Slots are never freed: no record_stream.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                target.copy_(host, non_blocking=True)
                self._ready[slot].record(self._stream)
        self._held[slot] = index
        self.copied.append(index)
        del self.copied[:-1024]  # enough to look at, and no more than that in a long run

    def _moved_out(self, index: int, layer: nn.Module, size: int) -> Tensor:
        """Return a layer's host buffer; its tensors become views of its slot."""
        # One a layer: the layer's own tensors go as soon as it is full, so that a base is never there twice.
        host = host_buffer(self, (size,), torch.uint8, self._on_gpu)
        slot, start = self.slots[index % len(self.slots)], 0
        # A list, because the loop changes what is walked through.
        for owner, name, tensor in list(frozen_tensors(layer)):
            stop = start + tensor.nbytes
            # As bytes: packed weights, 8-bit maxima and float32 biases travel in one piece.
            host[start:stop].copy_(tensor.contiguous().view(-1).view(torch.uint8))
            # `data`: a view with a version of its own, so that autograd takes a copy into the slot for no change of it.
            view = slot[start:stop].view(tensor.dtype).view(tensor.shape).data
            point_at(owner, name, tensor, view)
            start += aligned(tensor.nbytes)
        return host

    def _watch(self, index: int, layer: nn.Module) -> None:
        def before(module: nn.Module, inputs: object) -> None:
            # transformers 5.23 recomputes below the hooks of a layer, 5.17 above: then this is the backward pass.
            recomputes = self._going_back == index
            if not recomputes:
                self._going_back = None
            self.bring(index, backward=recomputes)

        def after(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> object:
            if isinstance(output, tuple):
                return (_Arrival.apply(output[0], self, index), *output[1:])
            return _Arrival.apply(output, self, index)

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)

    def arrived_back(self, index: int) -> None:
        """Take note that the backward pass reaches a layer."""
        self._going_back = index
        self.bring(index, backward=True)


class _Arrival(torch.autograd.Function):
    """A layer's output itself. Its backward pass comes before that of anything in the layer: the weights are fetched.

    The gradient of an output is whole when the layer after it is through, so that layer's slot is free by then.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, stream: LayerStream, index: int) -> Tensor:
        ctx.stream, ctx.index = stream, index
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.stream.arrived_back(ctx.index)
        return gradient, None, None


def point_at(owner: object, name: str, tensor: Tensor, place: Tensor) -> None:
    """Have a tensor's numbers be those at `place`: a parameter stays itself, with what bitsandbytes hung on it."""
    if isinstance(tensor, nn.Parameter):
        tensor.data = place
    else:
        setattr(owner, name, place)


def frozen_tensors(layer: nn.Module) -> Iterator[tuple[object, str, Tensor]]:
    """Yield (owner, attribute, tensor) of what a layer streams: weights, biases and block maxima of frozen linears.

    Tables of a quantisation state, about 1 KiB each, stay where they are.
    """
    for linear in layer.modules():
        if not isinstance(linear, nn.Linear) or linear.weight.requires_grad:
            continue
        yield linear, "weight", linear.weight
        if linear.bias is not None:
            yield linear, "bias", linear.bias
        weight: Any = linear.weight
        if hasattr(weight, "quant_state"):
            yield weight.quant_state, "absmax", weight.quant_state.absmax
            if weight.quant_state.nested:
                yield weight.quant_state.state2, "absmax", weight.quant_state.state2.absmax


def move_unstreamed(model: nn.Module, device: torch.device, but: nn.Module | None) -> None:
    """Move what is not streamed to the device: norms, head, tables of quantisation states, embedding, resident layers.

    `but` stays where it is.
    """
    staying = set[int]()
    if but is not None:
        staying = {id(tensor) for tensor in but.parameters()}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in staying and parameter.device != device:
                point_at(module, name, parameter, parameter.data.to(device))
        for name, buffer in list(module.named_buffers(recurse=False)):
            point_at(module, name, buffer, buffer.to(device))
        # bitsandbytes keeps these tables in an object of its own, which is neither parameter nor buffer.
        weight: Any = getattr(module, "weight", None)
        if hasattr(weight, "quant_state"):
            state = weight.quant_state
            state.code, state.absmax = state.code.to(device), state.absmax.to(device)
            if state.nested:
                state.offset = state.offset.to(device)
                state.state2.code, state.state2.absmax = state.state2.code.to(device), state.state2.absmax.to(device)


def aligned(size: int) -> int:
    """Return a size rounded up to whole steps of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


__all__ = ["SLOTS", "LayerStream", "aligned", "frozen_tensors", "move_unstreamed", "point_at", "streamed_layers"]
