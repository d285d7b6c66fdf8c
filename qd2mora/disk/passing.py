"""Names of what is being made or going: `.NAME.PID-RANDOM.partial` and `.old`, beside NAME; no two processes share one.

A kill leaves some behind; the next that writes under the same NAME removes those whose process is gone. Plainer names,
as earlier versions gave (`.NAME.partial`), may be anybody's and are left alone.
"""

import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from qd2mora.disk.systems import is_running

MADE, OLD = "partial", "old"
_PASSING = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d{1,10})-[0-9a-f]{8}\.(?P<kind>partial|old)", re.DOTALL)
_LONGEST = 200
"""Bytes of a name from which on it is cut: with what is added it may have 255."""
_given: set[str] = set()


def passing_name(path: Path, kind: str = MADE) -> Path:
    """Return a new name beside `path`, for what is being made or for the `old` that goes."""
    name = f".{_short(path.name)}.{os.getpid()}-{secrets.token_hex(4)}.{kind}"
    _given.add(name)
    return path.with_name(name)


def is_passing(name: str) -> bool:
    """Tell whether a name is one that only this package gives."""
    return _PASSING.fullmatch(name) is not None


def is_left_behind(name: str) -> bool:
    """Tell whether a name is one of ours whose process is gone."""
    found = _PASSING.fullmatch(name)
    if found is None:
        return False
    pid = int(found["pid"])
    if pid == os.getpid():  # a process before us may have had our number: ours is only what we gave
        return name not in _given
    return not is_running(pid)


def remove_left_behind(path: Path, kind: str = MADE) -> None:
    """Remove what processes that are gone have left of writing `path`."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return
    for name in names:
        found = _PASSING.fullmatch(name)
        if found and found["name"] == _short(path.name) and found["kind"] == kind and is_left_behind(name):
            remove_passing(path.with_name(name))


def remove_passing(place: Path) -> None:
    """Remove a file or folder of a passing name, as far as it goes."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
        return
    with suppress(OSError):
        os.unlink(place)


def _short(name: str) -> str:
    # Cut in bytes, because file systems count bytes; half a letter at the cut is dropped.
    return name.encode()[:_LONGEST].decode(errors="ignore")


__all__ = ["MADE", "OLD", "is_left_behind", "is_passing", "passing_name", "remove_left_behind", "remove_passing"]
