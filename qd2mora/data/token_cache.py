"""What can be made again, kept for a while: the folder, and what of it has to go.

Each start that keeps something new removes what nobody has used for KEPT_DAYS, then the longest unused until the rest
is within the limit. A run that has a removed file mapped reads on: the system keeps it until the run ends.
"""

import logging
import os
import re
import time
from contextlib import suppress
from pathlib import Path

from qd2mora.disk.owned import foreign_in
from qd2mora.disk.passing import is_left_behind, is_passing, remove_passing
from qd2mora.disk.sealed import MANIFEST
from qd2mora.disk.staged import remove_folder
from qd2mora.errors import InputRefused

KEPT_DAYS = 30
LIMIT_GIB = 20.0
ROWS, VALUES = "rows.arrow", "values.safetensors"
"""The file of an entry: tokens, or numbers that a model gave."""
_NAMES = (ROWS, VALUES, MANIFEST)
_PARTIAL_BEFORE = re.compile(r"\.partial-[a-z0-9_]{8}")
"""What earlier versions called what is being written, without saying by whom."""
_ENTRY = re.compile(r"[0-9a-f]{32}")
_log = logging.getLogger(__name__)


def cache_folder(kind: str) -> Path:
    """Return the folder of what is kept of a kind (`tokens`): in $QD2MORA_CACHE or ~/.cache/qd2mora."""
    return Path(os.environ.get("QD2MORA_CACHE") or Path.home() / ".cache" / "qd2mora") / kind


def tokens_folder() -> Path:
    """Return the folder of tokens."""
    return cache_folder("tokens")


def limit_bytes() -> int:
    """Return how much is kept: $QD2MORA_CACHE_GIB, else LIMIT_GIB. Raises InputRefused."""
    text = os.environ.get("QD2MORA_CACHE_GIB") or str(LIMIT_GIB)
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float("inf"):
        raise InputRefused(f"QD2MORA_CACHE_GIB: '{text}' will not do: a number of GiB, for example 20")
    return int(limit * 2**30)


def mark_used(folder: Path) -> None:
    """Note that an entry is of use now."""
    try:
        os.utime(folder)
    except OSError:  # a cache that others may only read
        _log.debug("%s cannot be marked as used", folder)


def prune(cache: Path, keep: Path, limit: int) -> None:
    """Remove entries that are long unused or beyond `limit` bytes; never `keep`, nor what is being written.

    What a kill left goes at once, what is being written counts; a folder that is not ours is not looked at.
    """
    for used, entry in _entries(cache):
        is_old = _PARTIAL_BEFORE.fullmatch(entry.name) and time.time() - used > 86400
        if is_left_behind(entry.name) or is_old:
            remove_passing(entry)
    # What is in use counts first; of the rest the longest unused goes.
    now, left = time.time(), limit - _size(keep)
    entries = sorted(_entries(cache), reverse=True)
    left -= sum(_size(entry) for _, entry in entries if is_passing(entry.name))
    for used, entry in entries:
        if entry == keep or not _ENTRY.fullmatch(entry.name):
            continue
        age = (now - used) / 86400
        left -= _size(entry)
        if age > KEPT_DAYS or left < 0:
            _log.info("removed of what was kept: %s, last used %.0f days ago", entry, age)
            remove_entry(entry)


def remove_entry(entry: Path) -> None:
    """Remove an entry that is all ours, damaged or not; one that somebody put something into stays."""
    if foreign_in(entry, _NAMES) is None:
        with suppress(OSError, InputRefused):
            remove_folder(entry, _NAMES)


def _entries(cache: Path) -> list[tuple[float, Path]]:
    """Return when each entry was last used, and the entry; another run may take some away meanwhile."""
    found = []
    for entry in cache.iterdir():
        try:
            found.append((entry.stat().st_mtime, entry))
        except FileNotFoundError:
            continue
    return found


def _size(entry: Path) -> int:
    try:
        return sum(file.stat().st_size for file in entry.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return 0


__all__ = [
    *("KEPT_DAYS", "LIMIT_GIB", "ROWS", "VALUES", "cache_folder", "limit_bytes", "mark_used"),
    *("prune", "remove_entry", "tokens_folder"),
]
