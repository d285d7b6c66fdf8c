"""Runs a function in a forked child, watched: what it printed, how it ended, how long it took, what it reached for."""

import contextlib
import io
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from qd2mora.base.host_memory import most_resident_bytes

_ALWAYS = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pickle.find_class"}
_WATCHED: dict[str, object] = {}


@dataclass
class Outcome:
    """How a child ended; `code` is what the command line would return, None where it was killed."""

    code: int | None
    out: str = ""
    err: str = ""
    seconds: float = 0.0
    cpu_s: float = 0.0
    grown_mib: float = 0.0
    events: list[str] = field(default_factory=list)

    @property
    def is_one_error_line(self) -> bool:
        return self.err.startswith("error: ") and self.err.count("\n") == 1


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if not _WATCHED:
        return
    marker, events = _WATCHED["marker"], _WATCHED["events"]
    assert isinstance(marker, str) and isinstance(events, list)
    about_canary = event in ("open", "import", "exec", "compile") and marker in repr(arguments)[:4000]
    if event in _ALWAYS or about_canary:
        events.append(f"{event} {repr(arguments)[:120]}")


def run(action: Callable[[], object], *, marker: str = "CANARY", limit_s: float = 30.0) -> Outcome:
    """Run `action` in a fork; an event that names `marker`, or that starts a program or opens a line, is noted."""
    reader, writer = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reader)
        outcome = _in_child(action, marker)
        with os.fdopen(writer, "w") as pipe:
            json.dump(outcome.__dict__, pipe)
        os._exit(0)
    os.close(writer)
    text = _read_all(reader, child, began + limit_s)
    os.waitpid(child, 0)
    outcome = Outcome(**json.loads(text)) if text else Outcome(None, err="killed or over time")
    outcome.seconds = time.monotonic() - began
    return outcome


def _read_all(reader: int, child: int, deadline: float) -> bytes:
    parts = []
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while True:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                os.kill(child, signal.SIGKILL)
                return b""
            part = pipe.read(1 << 16)
            if not part:
                return b"".join(parts)
            parts.append(part)


def _in_child(action: Callable[[], object], marker: str) -> Outcome:
    torch.set_num_threads(1)  # the parent's pool of threads does not live on in a fork, and would be waited for
    sys.addaudithook(_watch)
    out, err, events = io.StringIO(), io.StringIO(), []
    before, began = most_resident_bytes(), time.process_time()
    code: int | None = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        _WATCHED.update(marker=marker, events=events)
        try:
            action()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            # As the interpreter does it: the hook that the command line installs shows the traceback.
            sys.excepthook(*sys.exc_info())
            traceback.clear_frames(sys.exc_info()[2])
            code = 1
        _WATCHED.clear()
    grown = (most_resident_bytes() - before) / 2**20
    cpu_s = time.process_time() - began
    return Outcome(code, out.getvalue(), err.getvalue(), cpu_s=cpu_s, grown_mib=grown, events=events)


def command(*arguments: object) -> Callable[[], object]:
    """Return the command line with these arguments, as an action."""

    def action() -> None:
        from qd2mora.cli import main

        sys.argv = ["qd2mora", *map(str, arguments)]
        main()

    return action


@dataclass
class Result:
    """What a gate found: how many cases, which of them failed, and numbers worth keeping."""

    gate: str
    cases: int = 0
    failures: list[str] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)

    def check(self, holds: bool, case: str) -> None:
        self.cases += 1
        if not holds:
            self.failures.append(case[:400])


__all__ = ["Outcome", "Result", "command", "run"]
