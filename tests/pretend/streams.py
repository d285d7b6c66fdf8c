"""Streams and events without a GPU: order is told to torch's own race detector, work is done at once.

`torch.cuda._sanitizer` keeps, for each tensor, who read and wrote it on which stream, and knows of two accesses whether
events put one before the other. Here it hears of streams and events from these classes and of reads and writes from
`Watch`.
"""

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.cuda import _sanitizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_numbers = itertools.count(1)


class Order:
    """What is known of the order of accesses, and the races found in it."""

    def __init__(self) -> None:
        self.start_anew()

    def start_anew(self) -> None:
        """Forget all accesses."""
        self.handler = _sanitizer.EventHandler()
        self.current: list[Stream] = [Stream.default()]
        self.races: list[str] = []

    def launched(self, name: str, reads: set[int], writes: set[int], made: set[int]) -> None:
        """Note an operation on the current stream; pointers of storages."""
        found = self.handler._handle_kernel_launch(
            self.current[-1].id, reads - writes, reads & writes | writes, made, name, defaultdict(list)
        )
        self.races += [str(race) for race in found]


class Event:
    """Stands for torch.cuda.Event."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.id = next(_numbers)
        ORDER.handler._handle_event_creation(self.id)

    def record(self, stream: "Stream | None" = None) -> None:
        """Mark a point in a stream."""
        ORDER.handler._handle_event_record(self.id, (stream or current_stream()).id)

    def wait(self, stream: "Stream | None" = None) -> None:
        """Have a stream wait."""
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        """Have the host wait."""
        ORDER.handler._handle_event_synchronization(self.id)

    def query(self) -> bool:
        """Tell whether it has come to pass; work is done at once."""
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Return milliseconds; nothing takes any."""
        return 0.0


class Stream:
    """Stands for torch.cuda.Stream."""

    def __init__(self, device: object = None, **kwargs: object) -> None:
        self.id, self.device = next(_numbers), device
        ORDER.handler._handle_stream_creation(self.id)

    @classmethod
    def default(cls) -> "Stream":
        """Return the stream that everything runs on where none is named."""
        made = cls.__new__(cls)
        made.id, made.device = 0, None
        return made

    def wait_event(self, event: Event) -> None:
        """Let what comes next on this stream wait for an event."""
        ORDER.handler._handle_event_wait(event.id, self.id)

    def record_event(self, event: Event | None = None) -> Event:
        """Mark this point."""
        event = event or Event()
        event.record(self)
        return event

    def wait_stream(self, other: "Stream") -> None:
        """Let what comes next on this stream wait for all that another was given."""
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        """Have the host wait."""
        ORDER.handler._handle_stream_synchronization(self.id)


ORDER = Order()


def current_stream(device: object = None) -> Stream:
    """Return the stream that operations go to."""
    return ORDER.current[-1]


@contextlib.contextmanager
def stream(chosen: Stream | None) -> Iterator[None]:
    """Send operations to a stream."""
    ORDER.current.append(chosen or current_stream())
    try:
        yield
    finally:
        ORDER.current.pop()


def record_stream(tensor: Tensor, chosen: Stream) -> None:
    """Refuse what a real device refuses: a host tensor has no such kernel."""
    if tensor.device.type != "cuda":
        raise NotImplementedError("Could not run 'aten::record_stream' with arguments from the 'CPU' backend")


FAKES: dict[str, Any] = {"Stream": Stream, "Event": Event, "current_stream": current_stream, "stream": stream}


class Watch(TorchDispatchMode):
    """Tells the order of every operation's reads and writes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reads, writes = set[int](), set[int]()
        arguments = {argument.name: argument for argument in func._schema.arguments}
        given = dict(zip(arguments, args, strict=False)) | kwargs
        for name, value in given.items():
            info = arguments[name].alias_info if name in arguments else None
            (writes if info is not None and info.is_write else reads).update(_storages(value))
        found = func(*args, **kwargs)
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if not is_view:
            self._note(func._schema.name, reads, writes, _storages(found))
        return found

    def _note(self, name: str, reads: set[int], writes: set[int], found: set[int]) -> None:
        handler = ORDER.handler
        made = found - reads - writes
        for pointer in made:
            # Host memory is given out again at once, and under an old address a new tensor would seem the old one.
            if pointer in handler.tensors_accessed.accesses:
                handler._handle_memory_deallocation(pointer)
            handler._handle_memory_allocation(pointer)
        for pointer in reads | writes:
            handler.tensors_accessed.ensure_tensor_exists(pointer)
        if not name.startswith(("aten::empty", "aten::new_empty")):
            ORDER.launched(name, reads, writes | made, made)


def _storages(value: object) -> set[int]:
    leaves = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.numel())
    return {leaf.untyped_storage().data_ptr() for leaf in leaves}
