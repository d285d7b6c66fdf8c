"""Host memory: how much is left, how much was taken, and that it is given back when it is freed.

glibc takes blocks of up to 32 MiB from its heap once one of that size was freed, and a heap shrinks only from its end.
Packed weights and what a step frees then lie mixed, and the holes stay this process's memory: 0.8 GiB of them in a 7B
on a CPU. Large blocks are mapped one by one instead.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

_M_MMAP_THRESHOLD = -3
_STATUS = Path("/proc/self/status")
LARGE = 4 << 20
"""Bytes of a block that has a mapping of its own: packed weights of a 7B have twice as many, most of what a step holds
on a CPU has fewer, and is quicker to take from the heap."""
_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""By version of Linux's control groups: the limit, what is used of it, and what of that are pages of files."""


def give_back_large_blocks() -> None:
    """Tell the C library, where it knows the word; others give large blocks back anyway."""
    try:
        library = ctypes.CDLL(None)
    except (TypeError, OSError):  # Windows has no library of the program itself
        return
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, LARGE)


def available_bytes() -> int:
    """Return what this process may still take: before the machine swaps, or a container's limit ends it."""
    return max(0, min([psutil.virtual_memory().available, *_room_of_groups()]))


def most_resident_bytes() -> int:
    """Return this process's most resident memory so far."""
    if resource is None:
        return int(psutil.Process().memory_info().peak_wset)
    # Linux hands what getrusage says on to children, through exec too: a small one of a large parent would seem large.
    with suppress(OSError):
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def lockable_bytes() -> int | None:
    """Return what this user may lock into memory (`ulimit -l`); None where there is no limit, or none is known."""
    if resource is None:
        return None
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    return limit


def _room_of_groups() -> Iterator[int]:
    """Yield what is left of the limit of each control group that this process is in, and of those above it."""
    if not _OWN_GROUPS.exists():
        return
    for line in _OWN_GROUPS.read_text(encoding="utf-8").splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top = _GROUPS / "memory" if kinds else _GROUPS
        place = top / path.lstrip("/")
        # A container sees its own group at the top, under a path that may be that of the machine.
        for folder in (place, *place.parents[: len(place.parts) - len(top.parts)]):
            with suppress(OSError, ValueError):  # no limit, or not to be seen from here
                yield _room(folder, *_FILES[1 if kinds else 2])


def _room(folder: Path, limit: str, used: str, of_files: str) -> int:
    """Return a group's limit less what it uses; pages of files that nobody read lately can go."""
    most, taken = (int((folder / name).read_text(encoding="ascii")) for name in (limit, used))
    stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    return most - taken + int(stat.get(of_files, 0))


__all__ = ["LARGE", "available_bytes", "give_back_large_blocks", "lockable_bytes", "most_resident_bytes"]
