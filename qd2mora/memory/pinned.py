"""Pinned host memory, which copies run beside the computing from; plain memory where the system gives none.

How much may be pinned is limited in containers and by `ulimit -l`. Copies of plain memory give the same bytes: the
driver makes them wait for one another.

What lives as long as a run is plain memory whose pages are then registered with the driver, to the byte: torch's own
pinned blocks are rounded up to powers of two, 10 GiB for a 13B's 6.1.
"""

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
_told: set[str] = set()


def host_buffer(owner: object, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, is_pinned: bool) -> Tensor:
    """Return uninitialised host memory, pinned where that is asked for and given, for as long as its `owner` lives."""
    buffer = torch.empty(shape, dtype=dtype)
    if is_pinned and buffer.nbytes:
        _register(owner, buffer)
    return buffer


def _register(owner: object, buffer: Tensor) -> None:
    try:
        driver = torch.cuda.cudart()
    except (RuntimeError, AssertionError) as error:  # no driver, or a build of torch that knows none
        _say_once(str(error).strip().splitlines()[0])
        return
    status = int(driver.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
    if status:
        _say_once(f"CUDA error {status}")
        return
    # The pages must be let go of before they are freed: what is called then holds the buffer itself.
    weakref.finalize(owner, _unregister, driver, buffer)


def _unregister(driver: Any, buffer: Tensor) -> None:
    driver.cudaHostUnregister(buffer.data_ptr())


def pinned(tensor: Tensor) -> Tensor:
    """Return a pinned copy of a host tensor; the tensor itself where none is given."""
    return _pinned_or(tensor.pin_memory, lambda: tensor)


def _pinned_or(pin: Callable[[], Tensor], plain: Callable[[], Tensor]) -> Tensor:
    try:
        return pin()
    except RuntimeError as error:  # the driver's errors have no type of their own before torch 2.8
        _say_once(str(error).strip().splitlines()[0])
    return plain()


def _say_once(why: str) -> None:
    # Every buffer would say it again.
    if not _told:
        _log.warning("memory: host memory cannot be pinned (%s); copies no longer run beside the computing", why)
    _told.add(why)


__all__ = ["host_buffer", "pinned"]
