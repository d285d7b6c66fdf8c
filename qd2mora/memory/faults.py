"""Telling the errors of a device apart: out of memory can be mended, a lost device or process cannot.

PyTorch raises plain RuntimeError for much of this, so the text decides where the type does not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from qd2mora.errors import DeviceLost

T = TypeVar("T")

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
_LOST = ("CUDA error", "CUDA driver error", "NCCL", "Connection closed", "Connection reset", "gloo", "Broken pipe")


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether smaller pieces may do."""
    is_typed = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return is_typed or any(words in str(error) for words in _OUT_OF_MEMORY)


def tried(act: Callable[[], T]) -> tuple[T | None, bool]:
    """Return what `act` does, and whether memory ran out on the way."""
    try:
        return act(), False
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside the handler: the traceback that keeps what was allocated alive is gone.
    return None, True


def is_lost(error: Exception) -> bool:
    """Tell whether the device, or another process, is gone."""
    return not is_out_of_memory(error) and any(words in str(error) for words in _LOST)


@contextmanager
def as_lost() -> Iterator[None]:
    """Turn the error of a lost device or process into one line and exit code 3. Raises DeviceLost."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        first = str(error).strip().splitlines()[0]
        raise DeviceLost(f"the device or another process is lost ({first}); continue with --resume") from error


__all__ = ["as_lost", "is_lost", "tried"]
