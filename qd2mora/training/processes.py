"""What a run's processes tell each other. A step adds up its gradients once, when every process has all of its own.

That keeps a step whole: until then any process may say that it ran out of memory, and all do the step again. What only
one process can know (the folder, the checkpoint that is whole) the main one finds out and tells, refusals included, so
that none of them goes on alone. Nothing is pickled: tensors, and JSON as bytes.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce, broadcast

from qd2mora.base.host_memory import most_resident_bytes
from qd2mora.errors import InputRefused, StopError
from qd2mora.training.progress import Progress, State, best_of_json

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others, which may be loading or writing, before it takes them for lost."""
T = TypeVar("T")

BUCKET = 1 << 23
"""Gradient entries that are sent at once, 32 MiB of float32: many small tensors are one message."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    index: int
    count: int
    device: torch.device

    @classmethod
    def of(cls, accelerator: Accelerator) -> "Processes":
        """Return the processes that a launcher has started."""
        device = accelerator.device
        if device.type == "cpu":
            # Of several processes each has "cpu:0": what lies on "cpu" is not there to torch, and moves as a copy.
            device = torch.device("cpu")
        return cls(accelerator.process_index, accelerator.num_processes, device)

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes."""
        return self.index == 0

    def peak_bytes(self) -> int:
        """Return this process's most memory so far: allocated on the GPU, or resident on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return most_resident_bytes()

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.sum_numbers([0.0])

    def sum_numbers(self, numbers: Sequence[Tensor | float]) -> list[float]:
        """Return each number summed over all processes, in float64."""
        if self.count == 1:
            return [float(number) for number in numbers]
        # One message for all numbers, in float64: tokens of a long run are too many for float32.
        total = torch.tensor([float(number) for number in numbers], dtype=torch.float64, device=self.device)
        all_reduce(total)
        return total.tolist()

    def least(self, number: int) -> int:
        """Return the smallest of the processes' numbers."""
        if self.count == 1:
            return number
        smallest = torch.tensor([number], dtype=torch.int64, device=self.device)
        all_reduce(smallest, ReduceOp.MIN)
        return int(smallest)

    def sum_gradients(self, parameters: dict[str, nn.Parameter]) -> None:
        """Add up the gradients of all processes in place; a parameter that no process has one for keeps none."""
        if self.count == 1:
            return
        tensors = list(parameters.values())
        # A process whose rows missed an expert has no gradient for it, and all must send the same tensors.
        there = self.sum_numbers([float(tensor.grad is not None) for tensor in tensors])
        gradients = []
        for tensor, number in zip(tensors, there, strict=True):
            if number:
                if tensor.grad is None:
                    tensor.grad = torch.zeros_like(tensor)
                gradients.append(tensor.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            all_reduce(flat)
            for gradient, part in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """Return a tensor summed over all processes, in place."""
        if self.count > 1:
            all_reduce(tensor)
        return tensor

    def from_main(self, act: Callable[[], T]) -> T:
        """Let the main process act, and return what it found, JSON, on every process.

        Raises what `act` raised there: a StopError, on every process.
        """
        if self.count == 1:
            return act()
        answer: dict[str, object] = {}
        error: StopError | None = None
        if self.is_main:
            try:
                answer = {"found": act()}
            except StopError as stop:
                error, answer = stop, {"error": type(stop).__name__, "message": str(stop)}
        told = json.loads(self._bytes_from_main(json.dumps(answer).encode()))
        # After the others were told: raised in the handler, it would leave them waiting.
        if error is not None:
            raise error
        if "error" in told:
            raise _named(told["error"])(told["message"])
        found: T = told["found"]
        return found

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of the main process: computed on two GPUs they may differ in a last bit."""
        if self.count > 1:
            for tensor in tensors:
                # Collectives take tensors of the run's device, without gaps.
                sent = tensor.detach().to(self.device).contiguous()
                broadcast(sent, 0)
                with torch.no_grad():
                    tensor.copy_(sent)

    def state_from_main(self, state: State | None) -> State:
        """Return the main process's state on every process; the others need not see its files."""
        if self.count == 1:
            assert state is not None
            return state
        sent = json.loads(self._bytes_from_main(json.dumps(_described(state)).encode()))
        adapter: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        if state is not None:
            adapter, moments = state.adapter, state.moments
        progress = Progress(**sent["progress"])
        progress.best = best_of_json(progress.best)
        return State(
            {name: self._tensor_from_main(adapter.get(name), *kind) for name, kind in sent["adapter"].items()},
            {name: self._tensor_from_main(moments.get(name), *kind) for name, kind in sent["moments"].items()},
            sent["scalars"],
            progress,
        )

    def refuse_other(self, identity: dict[str, object]) -> None:
        """Refuse to train where the processes do not see the same files, versions and recipe. Raises InputRefused."""
        if self.count == 1:
            return
        of_main = json.loads(self._bytes_from_main(json.dumps(identity).encode()))
        # As JSON has it on both sides, or a tuple here would differ from the list that was sent.
        mine = json.loads(json.dumps(identity))
        other = [name for name in of_main.keys() | mine.keys() if of_main.get(name) != mine.get(name)]
        # All ask before any refuses: one that left alone would let the others wait for ever.
        (disagreeing,) = self.sum_numbers([float(bool(other))])
        if other:
            raise InputRefused(f"process {self.index} has another {sorted(other)[0]} than process 0; give all the same")
        if disagreeing:
            raise InputRefused(f"{disagreeing:.0f} processes have other files or versions than process 0, see there")

    def _bytes_from_main(self, content: bytes) -> bytes:
        # Length first: the others have to make room before they can receive.
        size = torch.tensor([len(content)], dtype=torch.int64, device=self.device)
        broadcast(size, 0)
        sent = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if self.is_main:
            sent.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        broadcast(sent, 0)
        return bytes(sent.cpu().numpy())

    def _tensor_from_main(self, tensor: Tensor | None, dtype: str, shape: list[int]) -> Tensor:
        if tensor is None:
            sent = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
        else:
            sent = tensor.to(self.device).contiguous()
        broadcast(sent, 0)
        return sent.cpu()


def _described(state: State | None) -> dict[str, Any]:
    """Return what a state holds beside the numbers of its tensors."""
    if state is None:
        return {}
    kinds = {
        part: {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()}
        for part, tensors in (("adapter", state.adapter), ("moments", state.moments))
    }
    return {**kinds, "scalars": state.scalars, "progress": asdict(state.progress)}


def _buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Cut a list into runs of one dtype and of about BUCKET entries."""
    buckets: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        if not buckets or buckets[-1][0].dtype != tensor.dtype or size + tensor.numel() > BUCKET:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.numel()
    return buckets


def _named(name: str) -> type[StopError]:
    return next((kind for kind in StopError.__subclasses__() if kind.__name__ == name), StopError)


__all__ = ["PATIENCE", "Processes"]
