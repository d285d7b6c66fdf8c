"""Runs of two processes that add up over gloo, each forked from the warmed server, as a launcher would start them."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import forked_runs as runs

PATIENCE_S = 60
PHASES = ["write_adapter", "write_optimizer", "seal_folder", "verify_folder", "rename", "remove_folder"]
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def start_pair(target: Callable[..., Any], *args: Any, log: Path | None = None) -> list[BaseProcess]:
    """Start `target(*args)` in two processes that find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [runs.start(anew, target, *args, log=log, env={**place, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]


def ended(pair: Sequence[BaseProcess], patience_s: float = PATIENCE_S) -> list[int | None]:
    """Wait for both; return their exit codes, None for one that hangs, which is killed."""
    until = time.monotonic() + patience_s
    codes = []
    for process in pair:
        process.join(max(0.0, until - time.monotonic()))
        codes.append(process.exitcode)
        process.kill()
        process.join()
    return codes


def outcome(target: Callable[..., Any], *args: Any, log: Path | None = None) -> list[int | None]:
    """Run `target(*args)` in two processes to their end; return the exit codes."""
    return ended(start_pair(target, *args, log=log))


@contextmanager
def running_pair(target: Callable[..., Any], *args: Any, log: Path | None = None) -> Iterator[list[BaseProcess]]:
    """Start two processes; whatever becomes of the block, none is left."""
    pair = start_pair(target, *args, log=log)
    try:
        yield pair
    finally:
        ended(pair, 0)


def train_pair(
    recipe: Path, resume: bool = False, changes: tuple[str, ...] = (), allow_changed: tuple[str, ...] = ()
) -> None:
    """Train as the command line would, resuming where there is a run; the second process may write nothing there."""
    from qd2mora.recipe import load_recipe
    from qd2mora.run_folder import is_run
    from qd2mora.training import train

    loaded = load_recipe(recipe, changes)
    if is_second():
        _forbid_writing(loaded.output)
    (recipe.parent / f"pid{os.environ.get('RANK', '0')}").write_text(str(os.getpid()), encoding="ascii")
    train(loaded, resume=resume and is_run(loaded.output), allow_changed=allow_changed)


def is_second() -> bool:
    return os.environ.get("RANK") == "1"


def bad_run(recipe: Path, call: int, kind: str) -> None:
    """Train with a forward pass of one process, the `call`th of the second one, that fails; alone, with any one."""
    import torch

    from qd2mora.memory.loss import RowLoss

    forward, calls = RowLoss.forward, []

    def failing(self: RowLoss, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == call and (is_second() or "RANK" not in os.environ):
            if kind == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(self, batch) * float(kind)
        return forward(self, batch)

    RowLoss.forward = failing  # type: ignore[method-assign]
    train_pair(recipe)


def slow_pair(recipe: Path, resume: bool = False) -> None:
    """Train with steps that leave time to send signals."""
    from qd2mora.training.loop import Training

    after = Training._after_step

    def slowly(self: Training) -> Any:
        (recipe.parent / "stepped").touch()
        time.sleep(0.1)
        return after(self)

    Training._after_step = slowly  # type: ignore[method-assign]
    train_pair(recipe, resume)


def watched_pair(recipe: Path) -> None:
    """Train slowly, watched closely."""
    from qd2mora.training import clock

    clock.LEAST_S = 2.0
    slow_pair(recipe)


def limited_pair(recipe: Path, size: int, is_late: bool = False) -> None:
    """Train where the process that writes may let no file grow beyond so many bytes.

    `is_late`: a save begins to write when it is waited for, so that no step on the way can hear of its end.
    """
    import resource

    if not is_second():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    if is_late:
        _write_late()
    train_pair(recipe)


def _write_late() -> None:
    from qd2mora.training.checkpoint import Saver

    write, finish, is_awaited = Saver._write, Saver.finish, threading.Event()

    def late(self: Saver, state: Any) -> None:
        is_awaited.wait()
        write(self, state)

    def waiting(self: Saver) -> None:
        if self._job is not None:
            is_awaited.set()
        finish(self)

    Saver._write, Saver.finish = late, waiting  # type: ignore[method-assign]


def dying_pair(recipe: Path, phase: str, victim: int) -> None:
    """Train; as the second save of the first process comes to a phase, that one or the other is killed."""
    from qd2mora.disk import durable
    from qd2mora.training import checkpoint

    place = durable if phase == "rename" else checkpoint
    name = "write_file" if phase.startswith("write") else phase
    # Two files in a save: the adapter's, the optimiser's.
    wanted = {"write_adapter": 3, "write_optimizer": 4}.get(phase, 2)
    owner: Any = place.os if phase == "rename" else place  # type: ignore[attr-defined]
    act, calls = getattr(owner, name), []

    def deadly(*args: Any, **kwargs: Any) -> Any:
        is_of_a_save = phase != "rename" or "step-" in str(args[-1])
        calls.extend([1] if is_of_a_save else [])
        if len(calls) == wanted and is_of_a_save:
            os.kill(int((recipe.parent / f"pid{victim}").read_text(encoding="ascii")), signal.SIGKILL)
        return act(*args, **kwargs)

    if not is_second():
        setattr(owner, name, deadly)
    train_pair(recipe, resume=True)


def _forbid_writing(folder: str) -> None:
    """End this process with code 98 where it changes anything in a folder."""
    inside = os.path.abspath(folder)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        is_change = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.utime")
        is_change = is_change or (event == "open" and isinstance(args[2], int) and args[2] & _WRITES != 0)
        paths = [str(arg) for arg in args[:2] if isinstance(arg, str | os.PathLike)]
        if is_change and any(os.path.abspath(path).startswith(inside) for path in paths):
            print(f"the second process changed {paths}: {event}", file=sys.stderr, flush=True)
            os._exit(98)

    sys.addaudithook(audit)


def anew(target: Callable[..., Any], *args: Any) -> None:
    """Forget the single process of the warm-up, then run."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    target(*args)
