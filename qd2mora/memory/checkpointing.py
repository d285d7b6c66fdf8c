"""Recomputing decoder layers in the backward pass instead of keeping their activations; their inputs on the host.

A recomputed layer keeps its input alone. Those inputs can leave: in the forward pass each is copied out on a stream of
its own, in the backward pass each comes back while the layer after it is still at work. Buffers are pinned and used
again in every pass. On a CPU the copies are plain ones, made at once.

The first layers are recomputed and the last ones kept: the backward pass starts at the kept ones and frees them before
it recomputes anything, so what recomputing takes never adds to what is kept.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from qd2mora.memory.pinned import host_buffer


class Boundaries:
    """Host copies of layer inputs, by order of leaving: those of the last layer come back first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)
        self._away: list[_Left] = []
        self._layer, self._is_going_back = -1, False
        self._starts: list[int] = []
        """Of each layer the place of its first input: micro batches may go through a layer one after another."""
        self.most_away = 0

    def enter(self, layer: int) -> None:
        """Have what leaves next be of a layer: that of a new pass where it comes before the last, or after a return."""
        # The last pass's backward is over, or never came.
        if self._is_going_back or layer < self._layer:
            self.forget()
        if layer != self._layer:
            self._layer = layer
            self._starts.append(len(self._away))

    def leave(self, tensor: Tensor) -> "_Left":
        """Copy a tensor out; autograd drops the device's copy, which lives until the copy is made."""
        left = _Left(self, self._buffer(tensor), len(self._away))
        if self._stream is None:
            left.host.copy_(tensor)
        else:
            # The tensor may still be written by what the device was given before.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                left.host.copy_(tensor, non_blocking=True)
            # Or the allocator would hand its memory on before the copy is made. Checkpoints of torch 2.8 to 2.11 save
            # an empty tensor of the host besides, which no stream can be told of.
            if tensor.device.type == "cuda":
                tensor.record_stream(self._stream)
        self._away.append(left)
        self.most_away = max(self.most_away, len(self._away))
        return left

    def come_back(self, left: "_Left") -> Tensor:
        """Return a tensor to the device, and start on the one that left before it."""
        self._is_going_back = left.was_wanted = True
        self._start(left)
        following = self._after(left.place)
        if following is not None and not self._away[following].was_wanted:
            self._start(self._away[following])
        tensor, left.here = left.here, None
        assert tensor is not None
        if left.arrived is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(left.arrived)
            # Allocated on the copying stream and read on this one: it must not be freed before that.
            if tensor.device.type == "cuda":
                tensor.record_stream(stream)
        return tensor

    def forget(self) -> None:
        """Let go of every input that is away: its graph is gone, or its backward pass is over."""
        # A copy that still reads such a buffer stands in the stream before the next one that writes it.
        for left in self._away:
            left.here = left.arrived = None
            self._free[(left.host.shape, left.host.dtype)].append(left.host)
        self._away.clear()
        self._starts.clear()
        self._layer, self._is_going_back = -1, False

    def _after(self, place: int) -> int | None:
        """Return what is wanted after an input: the next of its layer, or the first of the layer before."""
        # The backward pass goes through the layers in reverse, and through the micro batches of each in order.
        if place + 1 < len(self._away) and place + 1 not in self._starts:
            return place + 1
        earlier = [start for start in self._starts if start <= place][:-1]
        return earlier[-1] if earlier else None

    def _start(self, left: "_Left") -> None:
        if left.here is not None:
            return
        if self._stream is None:
            left.here = left.host.clone()
            return
        # In the order of the stream: after the copy out, and before the buffer is written again.
        with torch.cuda.stream(self._stream):
            left.here = left.host.to(self._device, non_blocking=True)
            left.arrived = torch.cuda.Event()
            left.arrived.record(self._stream)

    def _buffer(self, tensor: Tensor) -> Tensor:
        unused = self._free[(tensor.shape, tensor.dtype)]
        # Pinning is slow (the driver locks page after page), so that buffers go round from pass to pass.
        if unused:
            return unused.pop()
        return host_buffer(self, tensor.shape, tensor.dtype, self._stream is not None)


class _Left:
    """One input that is away: its host copy, its place in the order, and its copy on the device once that is back."""

    def __init__(self, store: Boundaries, host: Tensor, place: int) -> None:
        self.store, self.host, self.place = store, host, place
        self.here: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None
        self.was_wanted = False


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # transformers has embeddings ask for a gradient, which reentrant recomputing alone needs: it would stay, and be
    # computed, in vain.
    model.disable_input_require_grads()


def recompute_layers(model: PreTrainedModel, num_layers: int, offload_to_host: bool, device: torch.device) -> None:
    """Recompute the first `num_layers` decoder layers in the backward pass, their inputs in host memory where asked."""
    if num_layers == 0:
        return
    enable_checkpointing(model)
    layers: list[Any] = list(decoder_layers(model))
    store: Boundaries | None = None
    if offload_to_host:
        store = Boundaries(device)
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < num_layers
        if store is not None:
            # Where transformers puts the one function that it was given for all layers.
            layer._gradient_checkpointing_func = partial(_recomputed, store, index)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    decoder: Any = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    layers: nn.ModuleList = decoder.layers
    return layers


def _recomputed(store: Boundaries, index: int, layer: Callable[..., object], *inputs: object) -> object:
    store.enter(index)
    # The checkpoint's own hooks are the inner ones: of all that is saved its inputs alone come to these.
    with torch.autograd.graph.saved_tensors_hooks(store.leave, store.come_back):
        return checkpoint(layer, *inputs, use_reentrant=False)


__all__ = ["Boundaries", "decoder_layers", "enable_checkpointing", "recompute_layers"]
