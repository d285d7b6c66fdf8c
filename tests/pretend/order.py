"""Streaming and offload under torch's own race detector: `python order.py [CASE...]`, a line of JSON each.

Host tensors and streams that are not there: what is checked is the order that events put copies and products in.
Mutants leave one wait out each, and have to be caught.
"""

import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import card
import streams
import torch
from peft import PeftModel
from torch import Tensor

card.add_paths()

from qd2mora.base import Shape, random_base  # noqa: E402
from qd2mora.memory import streaming  # noqa: E402
from qd2mora.memory.by_layer import LayerByLayer  # noqa: E402
from qd2mora.memory.checkpointing import Boundaries, decoder_layers, recompute_layers  # noqa: E402
from qd2mora.memory.lean import make_lean  # noqa: E402
from qd2mora.memory.loss import RowLoss  # noqa: E402
from qd2mora.memory.streaming import LayerStream  # noqa: E402
from qd2mora.mixture import MixtureConfig, add_adapter  # noqa: E402
from qd2mora.recipe import Base  # noqa: E402

SHAPE = Shape(64, 192, 5, 4, 2, vocab=512, max_length=512)


class SaysCuda:
    """A CPU whose type reads `cuda`, so that the branches of a GPU run on host tensors."""

    type = "cuda"


@contextmanager
def host_memory_for_a_gpu() -> Iterator[None]:
    """Make host tensors where that device is named."""
    empty, to = torch.empty, Tensor.to

    def made(*args: Any, **kwargs: Any) -> Tensor:
        if isinstance(kwargs.get("device"), SaysCuda):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return empty(*args, **kwargs)

    def moved(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], SaysCuda):
            return self.clone()
        return to(self, *args, **kwargs)

    torch.empty, Tensor.to = made, moved
    try:
        yield
    finally:
        torch.empty, Tensor.to = empty, to


def races(is_streamed: bool, recomputed: int, offload: bool, resident: int = 0, in_turn: int = 1) -> int:
    """Run two passes, `in_turn` batches in each layer by turns; return how many accesses no event puts in order."""
    streams.ORDER.start_anew()
    base = random_base(SHAPE, Base(model="random:tiny", compute_dtype="float32"), torch.device("cpu"))
    make_lean(base)
    device: Any = SaysCuda()
    with host_memory_for_a_gpu():
        if is_streamed:
            layers = list(decoder_layers(base))
            LayerStream([layers[index] for index in streaming.streamed_layers(len(layers), resident)], device)
        if recomputed:
            recompute_layers(base, recomputed, offload, device)
        config = MixtureConfig(method="d2mora", target_modules=["q_proj", "down_proj"], rank=4)
        model = add_adapter(base, config, seed=0).train()
        ids = torch.randint(5, 500, (2, 24), generator=torch.Generator().manual_seed(1))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        batch["task_index"] = batch["group"] = torch.zeros(2, dtype=torch.long)
        batch["attention_mask"][1, 20:] = 0
        with streams.Watch():
            for _ in range(2):
                _pass_over(model, [batch] * in_turn)
                model.zero_grad()
    return len(streams.ORDER.races)


def _pass_over(model: PeftModel, batches: list[dict[str, Tensor]]) -> None:
    """Run batches forward and backward: alone, or in turn in each layer."""
    loss = RowLoss(model)
    if len(batches) == 1:
        loss(batches[0]).sum().backward()
        return
    layers = LayerByLayer(model)
    for batch in batches:
        layers.read(batch)
    layers.forward()
    for number, batch in enumerate(batches):
        with layers.last_states_of(number):
            loss(batch).sum().backward()
    layers.backward()


@contextmanager
def without(owner: type, function: str, line: str) -> Iterator[None]:
    """Leave a line of a method out."""
    whole = getattr(owner, function)
    source = textwrap.dedent(inspect.getsource(whole))
    assert source.count(line) == 1
    scope: dict[str, Callable[..., Any]] = {}
    exec(compile(source.replace(line, "pass"), "mutant", "exec"), vars(sys.modules[owner.__module__]), scope)
    setattr(owner, function, scope[function])
    try:
        yield
    finally:
        setattr(owner, function, whole)


STREAMED, AWAY, IN_TURN = (True, 0, False), (False, 4, True), (True, 5, True, 0, 3)
WHOLE = {
    "streamed": STREAMED,
    "streamed and recomputed": (True, 3, False),
    "streamed, recomputed, inputs away": (True, 5, True),
    "streamed, two resident": (True, 3, False, 2),
    "inputs away": AWAY,
    "streamed, inputs away, three in turn": IN_TURN,
}
_WAITS_FOR_DEVICE = "self._stream.wait_stream(torch.cuda.current_stream(self.device))"
_WAITS_FOR_COPY = "torch.cuda.current_stream(self.device).wait_event(self._ready[index % len(self.slots)])"
MUTANTS: dict[str, tuple[type, str, str, tuple[Any, ...]]] = {
    "a copy waits for nobody": (LayerStream, "_start", _WAITS_FOR_DEVICE, STREAMED),
    "a layer waits for no copy": (LayerStream, "bring", _WAITS_FOR_COPY, STREAMED),
    "an input leaves too early": (
        Boundaries,
        "leave",
        "self._stream.wait_stream(torch.cuda.current_stream(self._device))",
        AWAY,
    ),
    "an input is read too early": (Boundaries, "come_back", "stream.wait_event(left.arrived)", AWAY),
    "an input is read too early, in turn": (Boundaries, "come_back", "stream.wait_event(left.arrived)", IN_TURN),
}


def main(names: list[str]) -> None:
    """Print races of each case named, all without a name, and of each mutant."""
    torch.set_num_threads(1)
    for name in streams.FAKES:
        setattr(torch.cuda, name, streams.FAKES[name])
    for name in names or WHOLE:
        print(json.dumps({"case": name, "races": races(*WHOLE[name])}), flush=True)
    for name, (owner, function, line, case) in MUTANTS.items():
        with without(owner, function, line):
            print(json.dumps({"mutant": name, "races": races(*case)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
