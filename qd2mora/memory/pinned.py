"""Pinned host memory, which copies run beside the computing from; plain memory where the system gives none.

How much may be pinned is limited in containers and by `ulimit -l`. Copies of plain memory give the same bytes: the
driver makes them wait for one another.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
_told: set[str] = set()


def host_buffer(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, is_pinned: bool) -> Tensor:
    """Return uninitialised host memory, pinned where that is asked for and given."""
    if is_pinned:
        return _pinned_or(
            lambda: torch.empty(shape, dtype=dtype, pin_memory=True), lambda: torch.empty(shape, dtype=dtype)
        )
    return torch.empty(shape, dtype=dtype)


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
