"""What systems differ in, asked once: opening, forcing, locking, and whether a process is there.

Linux is where this runs and is tested. Windows has no `fcntl`, opens no folder, forces only files that are open for
writing, neither removes nor renames what is open, and knows neither links that must not be followed nor pipes in a
file's place by a flag. Python opens no file for child processes on any of them.
"""

import errno
import os
from pathlib import Path

import psutil
from filelock import lock_descriptor

try:
    import fcntl
except ModuleNotFoundError:
    fcntl = None  # type: ignore[assignment]

_TURN_S = 0.05


def _flags(*names: str) -> int:
    """Return what of these flags the system has, as one number."""
    found = 0
    for name in names:
        found |= vars(os).get(name, 0)
    return found


_PLAIN = _flags("O_RDONLY", "O_BINARY", "O_NOFOLLOW", "O_NONBLOCK")
# Never O_TRUNC: who asks for a lock that is held reads its holder from the file.
_LOCK = _flags("O_RDWR", "O_CREAT", "O_BINARY", "O_NOFOLLOW")
_NEW = _flags("O_WRONLY", "O_CREAT", "O_TRUNC", "O_BINARY")
OPENS_FOLDERS = hasattr(os, "O_DIRECTORY")
"""Whether a folder can be opened, and its list of names be forced to disk; NTFS keeps a journal of it."""
_TOUCHES_HANDLES = os.utime in os.supports_fd


def open_new(path: Path) -> int:
    """Open a file to be written anew."""
    return os.open(path, _NEW, 0o666)


def open_plain(path: Path) -> int:
    """Open a file to be read; no link is followed, and a pipe in its place does not make us wait. Raises OSError."""
    _refuse_link(path)
    return os.open(path, _PLAIN)


def open_lock(path: Path) -> int:
    """Open a file to be locked, made where it is not there; no link is followed. Raises OSError."""
    _refuse_link(path)
    return os.open(path, _LOCK, 0o666)


def _refuse_link(path: Path) -> None:
    if not hasattr(os, "O_NOFOLLOW") and path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def force_file(path: Path) -> None:
    """Force a file to disk."""
    _force(path, os.O_RDONLY if OPENS_FOLDERS else os.O_RDWR)


def force_folder(path: Path) -> None:
    """Force a folder's list of names to disk, where a folder can be opened."""
    if OPENS_FOLDERS:
        _force(path, os.O_RDONLY | os.O_DIRECTORY)


def _force(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock_alone(handle: int) -> bool:
    """Lock an open file for this handle alone; tell whether it was free. It ends with the handle. Raises OSError."""
    return lock_descriptor(handle, blocking=False)


def lock_with_readers(handle: int) -> None:
    """Wait for a lock that readers share and `lock_alone` excludes; where none can be shared, readers take turns.

    It ends with the handle. Raises OSError.
    """
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_SH)
    else:
        lock_descriptor(handle, poll_interval=_TURN_S)


def touch(handle: int, path: Path) -> None:
    """Set the time of an open file to now. Raises OSError."""
    os.utime(handle if _TOUCHES_HANDLES else path)


def read_start(handle: int, limit: int) -> bytes:
    """Return the first bytes of an open file; nothing where its holder keeps them locked."""
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        return os.read(handle, limit)
    except PermissionError:
        return b""


def write_whole(handle: int, content: bytes) -> None:
    """Make a few bytes all that an open file holds."""
    # Emptied first: behind a shorter record the end of a longer one would be left.
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, content)


def close_and_remove(handle: int, path: Path) -> None:
    """Remove a file that is open here, and close it: in this order where the system lets us, so that no other has it.

    One that another process opens meanwhile stays where nothing open can be removed.
    """
    try:
        os.unlink(path)
    except FileNotFoundError:  # somebody removed the folder by hand
        os.close(handle)
    except PermissionError:
        os.close(handle)
        _remove_closed(path)
    else:
        os.close(handle)


def _remove_closed(path: Path) -> None:
    try:
        os.unlink(path)
    except OSError:
        return


def is_running(pid: int) -> bool:
    """Tell whether a process is there; one whose number no process can have is not told to be gone."""
    try:
        return psutil.pid_exists(pid)
    except OverflowError:
        return True


__all__ = [
    "OPENS_FOLDERS",
    "close_and_remove",
    "force_file",
    "force_folder",
    "is_running",
    "lock_alone",
    "lock_with_readers",
    "open_lock",
    "open_new",
    "open_plain",
    "read_start",
    "touch",
    "write_whole",
]
