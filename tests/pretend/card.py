"""A CUDA card that is not there: tensors that say they lie on cuda:0 and are computed on the CPU.

Values and gradients are real, and so is the autograd engine (`guard.py`). An operation that mixes the card with host
memory raises, as on a real one. `Counts` holds what a card would have been given: launches, copies between host and
card, and the places where the host would have waited for it. To be used in a process of its own: torch sets its engine
up once, for the devices that there are.
"""

import contextlib
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import streams
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device("cuda", 0)
FREE, WHOLE = 20 << 30, 24 << 30

_WAITS = {
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select"),
    *("aten::unique_consecutive", "aten::_unique2"),
}
"""The host needs what they find before it can go on."""
_FREE_OF_CHARGE = {
    *("aten::view", "aten::_unsafe_view", "aten::transpose", "aten::t", "aten::permute", "aten::slice"),
    *("aten::select", "aten::unsqueeze", "aten::squeeze", "aten::expand", "aten::detach", "aten::alias"),
    *("aten::split", "aten::split_with_sizes", "aten::as_strided", "aten::unbind", "aten::diagonal"),
    *("aten::unfold", "aten::_reshape_alias", "aten::lift_fresh", "aten::empty", "aten::empty_strided"),
    *("aten::new_empty", "aten::empty_like", "aten::new_empty_strided", "aten::_local_scalar_dense"),
    *("aten::record_stream", "aten::is_pinned"),
}
"""Views and allocations: no kernel runs."""
_BY_INDEX = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
"""These take indices that lie on the host."""


@dataclass
class Counts:
    """What the card was given since `clear`, while `is_on`."""

    is_on: bool = False
    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(what, the line of ours) where the host stands still."""
    copies: Counter[tuple[str, str]] = field(default_factory=Counter)

    def clear(self) -> None:
        """Begin anew."""
        self.launches.clear()
        self.waits.clear()
        self.copies.clear()


COUNTS = Counts()


class OnCard(Tensor):
    """A tensor that says it lies on the card; `inner` is the host tensor that it is."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> "OnCard":
        made: OnCard = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CARD,
            requires_grad=requires_grad,
        )
        made.inner = inner
        return made

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the host tensor's: a wrapper's own has no address."""
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        """Return where the numbers are."""
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        """Wait for the card, and return numbers."""
        _wait("tolist")
        return self.inner.tolist()

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"OnCard({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Card(TorchDispatchMode):
    """While it is entered, what names the card makes tensors there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        named = _is_card(kwargs.get("device"))
        if named or any(isinstance(leaf, OnCard) for leaf in tree_leaves((args, kwargs))):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [each for each in tensors if isinstance(each, OnCard)]
    stays = _where_it_stays(name, args, kwargs, bool(ours))
    if name not in ("aten::_to_copy", "aten::copy_", "aten::to"):
        _refuse_mixed(name, args, tensors, ours)
    _count(name, args, ours)
    found = func(*tree_map(_inner, args), **_on_host(kwargs))
    if not isinstance(found, Tensor | tuple | list):
        return found
    if not stays:
        return found
    wrapped = tree_map(lambda each: OnCard(each) if type(each) is Tensor else each, found)
    if ours and name.startswith("aten::"):
        return return_and_correct_aliasing(func, args, kwargs, wrapped)
    return wrapped


def _where_it_stays(name: str, args: Any, kwargs: dict[str, Any], has_ours: bool) -> bool:
    """Tell whether the result is on the card; a copy over the bus is counted."""
    asked = kwargs.get("device")
    if name == "aten::copy_":
        target, source = (isinstance(each, OnCard) for each in args[:2])
        if target != source:
            _copied("onto the card" if target else "to the host", args[2] if len(args) > 2 else False)
        return target
    if asked is None:
        return has_ours
    stays = _is_card(asked)
    if name == "aten::_to_copy" and stays != has_ours:
        _copied("onto the card" if stays else "to the host", kwargs.get("non_blocking", False))
    return stays


def _refuse_mixed(name: str, args: Any, tensors: list[Tensor], ours: list["OnCard"]) -> None:
    if not ours:
        return
    for each in tensors:
        if isinstance(each, OnCard) or each.dim() == 0 or (name in _BY_INDEX and each is not args[0]):
            continue
        raise RuntimeError(
            f"Expected all tensors to be on the same device ({name}; host tensor of shape {tuple(each.shape)}) "
            f"at {_line_of_ours()}"
        )


def _count(name: str, args: Any, ours: list["OnCard"]) -> None:
    if not ours or not COUNTS.is_on:
        return
    if name not in _FREE_OF_CHARGE:
        COUNTS.launches[name if not _adds_up_floats(name, ours) else f"{name} of floats"] += 1
    if name in _WAITS:
        _wait(name)
    if name in _BY_INDEX and any(_is_mask(each) for each in (args[1] or ())):
        _wait(f"{name} by a mask")


def _adds_up_floats(name: str, ours: list["OnCard"]) -> bool:
    """Running sums of whole numbers are the same in any order."""
    return name in ("aten::cumsum", "aten::cumsum_") and ours[0].is_floating_point()


def _is_mask(index: object) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _copied(way: str, runs_beside: bool) -> None:
    if not COUNTS.is_on:
        return
    COUNTS.copies[way, _line_of_ours()] += 1
    if not runs_beside:
        _wait(f"copy {way}")


def _wait(what: str) -> None:
    if COUNTS.is_on:
        COUNTS.waits[what, _line_of_ours()] += 1


def _line_of_ours() -> str:
    frames = traceback.extract_stack()[::-1]
    for part in ("/qd2mora/", "/transformers/", "/bitsandbytes/"):
        for frame in frames:
            if part in frame.filename:
                return f"{part[1:]}{frame.filename.rpartition(part)[2]}:{frame.lineno}"
    return "?"


def _is_card(device: object) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _inner(leaf: object) -> object:
    if isinstance(leaf, OnCard):
        return leaf.inner
    if isinstance(leaf, torch.device) and leaf.type == "cuda":
        return torch.device("cpu")
    return leaf


def _on_host(kwargs: dict[str, Any]) -> dict[str, Any]:
    mapped: dict[str, Any] = tree_map(_inner, kwargs)
    if "pin_memory" in mapped:
        mapped["pin_memory"] = False
    return mapped


def put(module: nn.Module) -> None:
    """Put every parameter, buffer and table of quantisation of a module on the card."""
    done: dict[int, OnCard] = {}

    def moved(tensor: Tensor) -> OnCard:
        if isinstance(tensor, OnCard):
            return tensor
        if id(tensor) not in done:
            done[id(tensor)] = OnCard(tensor.detach().as_subclass(Tensor))
        return done[id(tensor)]

    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is None:
                continue
            if hasattr(parameter, "quant_state"):
                _put_state(parameter.quant_state, moved)
            part._parameters[name] = _parameter(parameter, moved(parameter))
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = moved(buffer)


def point_at(owner: object, name: str, tensor: Tensor, place: Tensor) -> None:
    """Stand for `streaming.point_at`: a host parameter cannot take a wrapper for its numbers."""
    if isinstance(tensor, nn.Parameter):
        assert isinstance(owner, nn.Module)
        owner._parameters[name] = _parameter(tensor, place)
    else:
        setattr(owner, name, place)


def _parameter(like: nn.Parameter, place: Tensor) -> nn.Parameter:
    there: Any = nn.Parameter(place, requires_grad=like.requires_grad)
    if hasattr(like, "quant_state"):
        # bitsandbytes looks at these where it multiplies; its own class cannot wrap a wrapper.
        there.quant_state, there.module, there.bnb_quantized = like.quant_state, None, True
        there.quant_type, there.compress_statistics = "nf4", True
        there.quant_storage, there.blocksize = torch.uint8, 64
    made: nn.Parameter = there
    return made


def _put_state(state: Any, moved: Callable[[Tensor], OnCard]) -> None:
    state.absmax, state.code = moved(state.absmax), moved(state.code)
    if state.nested:
        state.offset, state.state2.absmax = moved(state.offset), moved(state.state2.absmax)
        state.state2.code = moved(state.state2.code)


@contextlib.contextmanager
def present(free: int = FREE, has_bfloat16: bool = True) -> Iterator[Counts]:
    """Have torch say that the card is there, with `free` bytes free; count what it is given."""
    answers: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "a card that is not there",
        "get_device_capability": lambda device=None: (8, 6),
        "get_device_properties": lambda device=None: _Properties(),
        "mem_get_info": lambda device=None: (free, WHOLE),
        "is_bf16_supported": lambda including_emulation=True: has_bfloat16,
        "max_memory_allocated": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "set_per_process_memory_fraction": lambda fraction, device=None: None,
        "empty_cache": lambda: None,
        "cudart": lambda: DRIVER,
        "synchronize": lambda device=None: None,
        "manual_seed": torch.manual_seed,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "get_rng_state_all": lambda: [],
        **streams.FAKES,
    }
    before = {name: getattr(torch.cuda, name) for name in answers}
    fork, generator, record = torch.random.fork_rng, torch.Generator, Tensor.record_stream
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        for name, answer in answers.items():
            setattr(torch.cuda, name, answer)
        torch.random.fork_rng = lambda *args, **kwargs: fork(devices=[])
        torch.Generator = _HostGenerator
        Tensor.record_stream = streams.record_stream
        COUNTS.clear()
        COUNTS.is_on = True
        with Card():
            yield COUNTS
    finally:
        COUNTS.is_on = False
        for name, function in before.items():
            setattr(torch.cuda, name, function)
        torch.random.fork_rng, torch.Generator = fork, generator
        Tensor.record_stream = record


class Driver:
    """The calls of CUDA's runtime that are made by name: pages of the host that are registered with it."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.most = 0

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:  # noqa: N802
        """Pin pages; as the real one, refuse what is registered already."""
        if pointer in self.registered:
            return 712
        self.registered[pointer] = size
        self.most = max(self.most, sum(self.registered.values()))
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:  # noqa: N802
        """Let go of them."""
        return 0 if self.registered.pop(pointer, None) else 713


DRIVER = Driver()


class _Properties:
    name, total_memory, major, minor, multi_processor_count = "a card that is not there", WHOLE, 8, 6, 82


_REAL_GENERATOR = torch.Generator


class _HostGenerator:
    """Draws are made on the host, whichever device is named."""

    def __new__(cls, device: object = "cpu") -> torch.Generator:
        return _REAL_GENERATOR()


def add_paths() -> None:
    """Find the tests' own parts from a child process."""
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests.parent), str(tests), str(tests / "memory"), str(Path(__file__).parent)]
