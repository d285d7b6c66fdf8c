"""A system that has less than Linux, made in this process: what Windows lacks is not there for our modules.

Libraries are loaded first: they know this system and would not load without. Run as a program, this imports every
module of the package, then does with a disk and a chat template what runs do, and prints what it imported.
"""

import builtins
import contextlib
import ctypes
import errno
import importlib
import os
import signal
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).parents[2] / "qd2mora"
MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "select", "syslog", "readline"}
"""Windows has a `select`, but not for pipes."""
NAMES: dict[ModuleType, set[str]] = {
    os: {
        *("O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "fork", "forkpty", "getuid", "geteuid", "getgid"),
        *("getegid", "pread", "pwrite", "posix_fallocate", "posix_fadvise", "statvfs", "fstatvfs", "uname", "sysconf"),
        *("sched_getaffinity", "wait", "setsid", "killpg", "mkfifo", "fchown", "chown", "nice", "getloadavg"),
    },
    signal: {"SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP", "SIGALRM", "SIGCHLD", "setitimer"},
}
"""What Linux has and Windows has not; SIGKILL too, which the standard library needs here."""
OPTIONAL = {"triton", "lm_eval", "deepspeed", "gguf", "resvg_py", "tensorboard", "rouge_score", "llama_cpp"}
OPTIONAL |= {"fastapi", "starlette", "uvicorn"}
_real_import, _real_open, _real_unlink, _real_rename = builtins.__import__, os.open, os.unlink, os.rename


def import_all() -> list[str]:
    """Import every module of the package; return the names of those whose libraries are here."""
    files = (path.relative_to(PACKAGE.parent).with_suffix("").parts for path in sorted(PACKAGE.rglob("*.py")))
    names = [".".join(parts).removesuffix(".__init__") for parts in files]
    there = []
    for name in names:
        if name != "qd2mora.__main__":
            try:
                importlib.import_module(name)
                there.append(name)
            except ModuleNotFoundError as error:
                assert error.name in OPTIONAL, error
            except Exception as error:
                assert "pip install" in str(error), error
    return there


def forget() -> None:
    """Let every module of the package be loaded anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "qd2mora"]:
        del sys.modules[name]
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING):
        table.pop("QD2MORA")  # PEFT registers a method once a process


def take_away() -> None:
    """Make this process such a system, for whatever of the package is loaded from now on."""
    for module, names in NAMES.items():
        for name in names & vars(module).keys():
            delattr(module, name)
    os.supports_fd.discard(os.utime)
    builtins.__import__ = _import
    ctypes.CDLL.__init__ = _no_library  # type: ignore[method-assign]
    os.open, os.unlink, os.rename = _open_file, _unlink, _rename  # type: ignore[assignment]


def _import(
    name: str,
    globals: Mapping[str, object] | None = None,
    locals: Mapping[str, object] | None = None,
    fromlist: Sequence[str] = (),
    level: int = 0,
) -> ModuleType:
    asking = str((globals or {}).get("__name__"))
    if name.partition(".")[0] in MODULES and (asking.startswith("qd2mora") or asking == "__main__"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return _real_import(name, globals, locals, fromlist, level)


def _no_library(self: ctypes.CDLL, name: str | None = None, *arguments: object, **keywords: object) -> None:
    raise TypeError("argument of type 'NoneType' is not iterable")


def _open_file(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
    """Open files, never folders."""
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return _real_open(path, flags, mode, dir_fd=dir_fd)


def _is_open(path: str) -> bool:
    """Tell whether this process has a file open, or one below a folder."""
    inside = os.path.abspath(path)
    there = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            there.append(os.readlink(f"/proc/self/fd/{number}"))
    return any(each == inside or each.startswith(inside + os.sep) for each in there)


def _unlink(path: str, *, dir_fd: int | None = None) -> None:
    """Remove what is not open."""
    if _is_open(path) and not stat.S_ISDIR(os.lstat(path).st_mode):
        raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))
    _real_unlink(path, dir_fd=dir_fd)


def _rename(old: str, new: str) -> None:
    """Rename onto nothing, and nothing in which a file is open."""
    if os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists", str(new))
    if _is_open(old):
        raise PermissionError(errno.EACCES, "The process cannot access the file", str(old))
    _real_rename(old, new)


def use(folder: Path) -> None:
    """Do on such a system what a run does on disk, with locks and with a chat template."""
    from qd2mora.base.host_memory import available_bytes, give_back_large_blocks
    from qd2mora.data import chat_template_child
    from qd2mora.data.chat_template import ChatTemplate
    from qd2mora.disk.lock import locked
    from qd2mora.disk.sealed import seal_whole_folder, verify_folder
    from qd2mora.disk.staged import staged_folder
    from qd2mora.errors import DamagedFile, InputRefused
    from qd2mora.stopping import listening

    give_back_large_blocks()
    assert available_bytes() > 0
    out = folder / "out"
    out.mkdir()  # an empty one is taken
    with listening(), locked(folder / "LOCK"):
        with contextlib.suppress(InputRefused), locked(folder / "LOCK"):
            raise AssertionError("a lock was taken twice")
        for replaces in (None, ("a",)):
            with staged_folder(out, replaces) as stage:
                (stage / "a").write_text("what is kept", encoding="utf-8")
                seal_whole_folder(stage, {}, {"kind": "test"})
    assert not (folder / "LOCK").exists()
    verify_folder(out)
    (out / "a").rename(folder / "b")
    (out / "a").symlink_to(folder / "b")
    with contextlib.suppress(DamagedFile):
        verify_folder(out)
        raise AssertionError("a link was followed")
    with ChatTemplate("{{ messages[0].content }}", {}, "a template") as template:
        assert template.render([{"role": "user", "content": "hi"}]) == "hi"
    chat_template_child._bound_memory(1)  # the child above is a process of Linux; here nothing may be bounded


def main() -> None:
    """Load libraries, take away, load the package anew, and use it in the folder that is named."""
    import_all()
    forget()
    take_away()
    print("\n".join(import_all()))
    use(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
