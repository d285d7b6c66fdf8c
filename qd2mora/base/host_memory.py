"""Host memory: how much is left, and that it is given back when it is freed.

glibc takes blocks of up to 32 MiB from its heap once one of that size was freed, and a heap shrinks only from its end.
Packed weights and what a step frees then lie mixed, and the holes stay this process's memory: 0.8 GiB of them in a 7B
on a CPU. Large blocks are mapped one by one instead.
"""

import ctypes
from pathlib import Path

_M_MMAP_THRESHOLD = -3
LARGE = 4 << 20
"""Bytes of a block that has a mapping of its own: packed weights of a 7B have twice as many, most of what a step holds
on a CPU has fewer, and is quicker to take from the heap."""


def give_back_large_blocks() -> None:
    """Tell the C library, where it knows the word; others give large blocks back anyway."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, LARGE)


def available_bytes() -> int | None:
    """Return what processes may still take before the machine swaps; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


__all__ = ["LARGE", "available_bytes", "give_back_large_blocks"]
