"""Runs the command line in a fork on standard streams of any condition, as an interpreter would have found them."""

import io
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

CONDITIONS = ("kept", "closed", "full", "broken")


@dataclass
class Printed:
    """How a command ended, None where it was killed, and what reached a stream that is kept."""

    code: int | None
    out: str = ""
    err: str = ""


def run_on(
    *arguments: object,
    out: str = "kept",
    err: str = "kept",
    given: bytes = b"",
    encoding: str = "utf-8",
    limit_s: float = 120,
) -> Printed:
    """Run `qd2mora` with these arguments; `given` is standard input, `encoding` what the streams are to speak."""
    with tempfile.TemporaryDirectory() as folder:
        kept = {1: Path(folder) / "out", 2: Path(folder) / "err"}
        source = Path(folder) / "in"
        source.write_bytes(given)
        child = os.fork()
        if child == 0:
            _child([str(argument) for argument in arguments], source, kept, {1: out, 2: err}, encoding)
        code = _waited(child, limit_s)
        texts = [path.read_bytes().decode("utf-8", "replace") if path.exists() else "" for path in kept.values()]
    return Printed(code, *texts)


def on_terminal(*arguments: object) -> tuple[int | None, str]:
    """Run `qd2mora` with a terminal for its output; return the exit code and what the terminal was sent."""
    here, there = os.openpty()
    child = os.fork()
    if child == 0:
        os.close(here)
        for handle in (1, 2):
            os.dup2(there, handle)
        _command([str(argument) for argument in arguments], "utf-8")
    os.close(there)
    parts, last = [], time.monotonic() + 120
    while time.monotonic() < last:
        if not select.select([here], [], [], 1)[0]:
            continue
        try:
            part = os.read(here, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(here)
    return _waited(child, 10), b"".join(parts).decode("utf-8", "backslashreplace")


def _child(
    arguments: list[str], source: Path, kept: dict[int, Path], conditions: dict[int, str], encoding: str
) -> None:
    os.dup2(os.open(source, os.O_RDONLY), 0)
    for handle, condition in conditions.items():
        if condition == "closed":
            os.close(handle)
            continue
        if condition == "broken":
            reader, writer = os.pipe()
            os.close(reader)
        else:
            target = "/dev/full" if condition == "full" else kept[handle]
            writer = os.open(target, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(writer, handle)
        os.close(writer)
    _command(arguments, encoding)


def _command(arguments: list[str], encoding: str) -> None:
    """Run the command in this process and end it as an interpreter does: with 120 where streams cannot be emptied."""
    code: object = 1
    try:
        torch.set_num_threads(1)
        own = [_stream(handle, encoding) for handle in range(3)]
        sys.stdin, sys.stdout, sys.stderr = own  # type: ignore[assignment]
        sys.argv = ["qd2mora", *arguments]
        from qd2mora.cli import main

        try:
            main()
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
        for handle in range(3):
            os.fstat(handle)  # or a file of ours might have become what libraries take for standard output
        try:
            for stream in (sys.stdout, sys.stderr, *own[1:]):
                if stream is not None:
                    stream.flush()
        except (OSError, ValueError):
            code = 120
    except BaseException:
        traceback.print_exc()
        code = 99
    os._exit(code if isinstance(code, int) else 1)


def _stream(handle: int, encoding: str) -> io.TextIOWrapper | None:
    try:
        return os.fdopen(handle, "r" if handle == 0 else "w", encoding=encoding, closefd=False)
    except OSError:
        return None


def _waited(child: int, limit_s: float) -> int | None:
    last = time.monotonic() + limit_s
    while time.monotonic() < last:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


__all__ = ["CONDITIONS", "Printed", "on_terminal", "run_on"]
