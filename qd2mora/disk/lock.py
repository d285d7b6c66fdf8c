"""One output, one process: a lock on a run folder, or beside a file or folder that is being made.

It ends with its holder, however that ends.

The lock is the kernel's, so a killed holder leaves none. The file says who holds it. On file systems that do
not share locks between machines it is a lease too: the holder touches it, and a file of another machine counts as held
while it is fresh.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qd2mora.disk.systems import close_and_remove, lock_alone, open_lock, read_start, touch, write_whole
from qd2mora.errors import InputRefused

# Six touches a lease: clocks and network file systems may lose several before a live holder looks dead.
TOUCH_S = 10.0
LEASE_S = 60.0
_held: set[str] = set()


@contextmanager
def locked(path: Path, what: str = "output", place: Path | None = None) -> Iterator[None]:
    """Hold the lock file `path` while the block runs, making its folder; an empty folder made here is removed again.

    `what` and `place` name in errors what is locked: else the lock's folder, as an output.

    Raises InputRefused where another process holds it, naming that one, or where the folder cannot be made.
    """
    # Noted before the lock makes them: a run that is refused leaves no empty folders behind.
    made = [parent for parent in path.parents if not parent.exists()]
    handle = _acquire(path, f"{what}: '{place or path.parent}'")
    name = os.path.realpath(path)
    _held.add(name)
    ended = threading.Event()
    beat = threading.Thread(target=_touch, args=(handle, path, ended), name="lock", daemon=True)
    beat.start()
    try:
        yield
    finally:
        # The toucher ends before the handle is closed: its number may be another file's a moment later.
        ended.set()
        beat.join()
        _held.discard(name)
        close_and_remove(handle, path)
        with contextlib.suppress(OSError):  # not empty: the run is in it
            for folder in made:
                os.rmdir(folder)


def _acquire(path: Path, named: str) -> int:
    """Return the locked handle of the file that stands at `path`, and not of one removed meanwhile."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = open_lock(path)
        except FileNotFoundError:  # the last holder removed the folder between the two calls
            continue
        except OSError as error:
            raise InputRefused(f"{named} cannot be written: {error.strerror}") from error
        if not lock_alone(handle):
            holder = _holder(handle)
            os.close(handle)
            raise InputRefused(f"{named} is in use by {holder}; wait for it or stop it")
        # The last holder removes its file: we may have locked one that no longer has the name, and that the next one
        # would not meet.
        if not _is_still_there(handle, path):
            os.close(handle)
            continue
        # Looked at under the lock, written only then: what stands there may be anybody's file, or another machine's
        # fresh lease.
        _refuse_foreign(handle, path)
        _refuse_leased(handle, named)
        record = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_whole(handle, json.dumps(record).encode())
        return handle


def _is_still_there(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _refuse_foreign(handle: int, path: Path) -> None:
    """What has content and no holder in it is somebody's file of that name; a cut may have left zeros."""
    if read_start(handle, 4096).strip(b"\0") and "pid" not in _record(handle):
        os.close(handle)
        raise InputRefused(f"'{path}' is no lock of ours; move that file elsewhere")


def _refuse_leased(handle: int, named: str) -> None:
    """A fresh file of another machine is held there, though this machine's kernel does not know."""
    if _record(handle).get("host", socket.gethostname()) == socket.gethostname():
        return
    age = time.time() - os.fstat(handle).st_mtime
    # Of a clock that is ahead of ours the time says nothing; whether the holder goes on touching the file does.
    if age >= LEASE_S or (age < 0 and not _is_touched(handle)):
        return
    holder = _holder(handle)
    os.close(handle)
    if age < 0:
        raise InputRefused(f"{named} is in use by {holder}; wait for it or stop it")
    raise InputRefused(
        f"{named} was in use {age:.0f} s ago by {holder}; if that one has ended, try again in {LEASE_S - age:.0f} s"
    )


def _is_touched(handle: int) -> bool:
    """Watch whether somebody touches the file, for as long as two touches are apart."""
    before, until = os.fstat(handle).st_mtime_ns, time.monotonic() + 2 * TOUCH_S
    while time.monotonic() < until:
        if os.fstat(handle).st_mtime_ns != before:
            return True
        time.sleep(0.1)
    return False


def _holder(handle: int) -> str:
    record = _record(handle)
    if not record:
        return "another process"
    return f"process {record.get('pid')} on {record.get('host')}, since {record.get('started')}"


def _record(handle: int) -> dict[str, object]:
    try:
        content = json.loads(read_start(handle, 4096))
    except ValueError:  # just made, or cut short
        return {}
    return content if isinstance(content, dict) else {}


def _touch(handle: int, path: Path, ended: threading.Event) -> None:
    while not ended.wait(TOUCH_S):
        with contextlib.suppress(OSError):  # a full or lost disk shows elsewhere
            touch(handle, path)


def is_held_here(path: Path) -> bool:
    """Tell whether this process holds a lock."""
    return os.path.realpath(path) in _held


def lock_beside(path: Path) -> Path:
    """Return the lock of a file or folder that is being made: a hidden file beside it while that lasts."""
    return path.with_name(f".{path.name}.lock")


__all__ = ["LEASE_S", "is_held_here", "lock_beside", "locked"]
