"""Whole runs in processes of their own, for tests that kill them: each is forked from a server that has imported torch.

The server is warmed with one run, so that a fork trains at once and kills land where they should.
"""

import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import tiny  # noqa: E402


def warm() -> None:
    """Import everything and train once, where this module is preloaded."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
        make(Path(name))
        recipe = write_recipe(Path(name), Path(name) / "run", "train.steps=2", "adapter.dropout=0.1")
        from qd2mora.recipe import load_recipe
        from qd2mora.training import train

        train(load_recipe(recipe))


def make(folder: Path) -> Path:
    """Make a base and two tasks."""
    tiny.save_base(folder / "base")
    tiny.save_tasks(folder / "data", number=12)
    return folder


def write_recipe(made: Path, output: Path, *overrides: str, method: str = "d2mora") -> Path:
    """Write a recipe beside its output: 8 steps, a save at each, both tasks without held-out rows."""
    from qd2mora.recipe import load_recipe

    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.parent / f"{output.name}.yaml"
    path.write_text(tiny.recipe_text(made / "base", made / "data", output, method=method), encoding="utf-8")
    plain = ["train.steps=8", "train.save_every=1", "data.tasks.0.validation=0", "data.tasks.1.validation=0"]
    path.write_text(load_recipe(path, [*plain, *overrides]).dump_yaml(), encoding="utf-8")
    return path


def context() -> Any:
    """Return the fork server's context."""
    server = multiprocessing.get_context("forkserver")
    # Python 3.11 does not hand sys.path on to the preloaded modules, and passes over those that it does not find.
    os.environ["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in (HERE, HERE.parent, HERE.parents[1]))
    server.set_forkserver_preload(["warmed"])
    return server


def start(
    target: Callable[..., Any], *args: Any, log: Path | None = None, env: dict[str, str] | None = None
) -> BaseProcess:
    """Start `target(*args)` in a fork; its exit code is that of the command line."""
    process = context().Process(target=_main, args=(target, args, log, env or {}))
    process.start()
    return process


def outcome(target: Callable[..., Any], *args: Any, log: Path | None = None, env: dict[str, str] | None = None) -> int:
    """Run `target(*args)` in a fork to its end; return the exit code, negative where a signal ended it."""
    process = start(target, *args, log=log, env=env)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def train_run(recipe: Path, resume: bool = False, changes: tuple[str, ...] = (), allowed: tuple[str, ...] = ()) -> None:
    """Train as the command line would, resuming where there is a run and `resume` says so."""
    from qd2mora.recipe import load_recipe
    from qd2mora.run_folder import is_run
    from qd2mora.training import train

    loaded = load_recipe(recipe, changes)
    train(loaded, resume=resume and is_run(loaded.output), allow_changed=allowed)


def threaded_run(recipe: Path, threads: int, allowed: tuple[str, ...]) -> None:
    """Resume where so many threads are set."""
    import torch

    torch.set_num_threads(threads)
    train_run(recipe, resume=True, allowed=allowed)


def result_of(run: Path) -> dict[str, bytes]:
    """Return the bytes that two equal runs share: the adapter, and adapter and optimiser of the last checkpoint."""
    last = max((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    files = [last / "adapter.safetensors", last / "optimizer.safetensors", run / "adapter/adapter_model.safetensors"]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in files}


def newest_valid(run: Path) -> int:
    """Return the step of the newest checkpoint that is whole, 0 where there is none."""
    from qd2mora.disk.sealed import verify_folder
    from qd2mora.errors import DamagedFile
    from qd2mora.training.checkpoint import steps_on_disk

    for step in reversed(steps_on_disk(run / "checkpoints")):
        with contextlib.suppress(DamagedFile, FileNotFoundError):
            verify_folder(run / "checkpoints" / f"step-{step}")
            return step
    return 0


def losses_of(run: Path) -> list[float]:
    """Return the logged losses."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@contextlib.contextmanager
def _output(log: Path | None) -> Iterator[None]:
    with open(log or os.devnull, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        yield


def _main(target: Callable[..., Any], args: tuple[Any, ...], log: Path | None, env: dict[str, str]) -> None:
    os.environ.update(env)
    import torch

    from qd2mora.errors import StopError

    torch.set_num_threads(1)
    with _output(log):
        try:
            target(*args)
            code = 0
        except StopError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = error.exit_code
        except BaseException:
            traceback.print_exc()
            code = 99
        sys.stdout.flush()
        os._exit(code)


def listening_run(recipe: Path) -> None:
    """Train as the command line does, telling by a file that signals are handled from here on."""
    from qd2mora.stopping import listening

    with listening():
        recipe.with_suffix(".listening").touch()
        train_run(recipe)


def slow_run(recipe: Path) -> None:
    """Train with steps of a fifth of a second."""
    import time

    from qd2mora.training.journal import StepDisplay

    StepDisplay.step = lambda self, step, metrics: time.sleep(0.2)  # type: ignore[method-assign]
    train_run(recipe)


def stubborn_run(recipe: Path) -> None:
    """Train in one endless step: the first signal waits for its end."""
    import time

    from qd2mora.training.journal import StepDisplay

    def never(self: StepDisplay, step: int, metrics: dict[str, float]) -> None:
        recipe.with_suffix(".listening").touch()
        while True:
            time.sleep(0.01)

    StepDisplay.step = never  # type: ignore[method-assign]
    train_run(recipe)


def interrupted_run(recipe: Path, step: int) -> None:
    """Train; a signal comes in a step at whose end no save is due."""
    import signal

    from qd2mora.training.journal import StepDisplay

    def raising(self: StepDisplay, shown: int, metrics: dict[str, float]) -> None:
        if shown == step - 1:  # shown before the next step begins
            signal.raise_signal(signal.SIGUSR1)

    StepDisplay.step = raising  # type: ignore[method-assign]
    train_run(recipe)


def resting(beaten: Path) -> None:
    """Give signs of life, say so, then none for half a second, which is no reason to give up."""
    import time

    from qd2mora.training.clock import Watchdog

    with Watchdog(1.0) as watchdog:
        for _ in range(10):
            watchdog.beat()
            time.sleep(0.01)
        watchdog.beat()
        beaten.touch()
        for _ in range(10):
            time.sleep(0.05)
        watchdog.beat()


def limited_run(recipe: Path, size: int) -> None:
    """Train where no file may grow beyond so many bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    train_run(recipe)


def hanging_run(recipe: Path) -> None:
    """Train with a sixth step that never ends, watched closely."""
    import time

    from qd2mora.memory.loss import RowLoss
    from qd2mora.training import clock

    clock.LEAST_S = 1.0
    forward, calls = RowLoss.forward, []

    def hanging(self: RowLoss, batch: Any) -> Any:
        calls.append(1)
        while len(calls) == 11:
            time.sleep(0.1)
        return forward(self, batch)

    RowLoss.forward = hanging  # type: ignore[method-assign]
    train_run(recipe)
