"""Runs that are killed again and again, each forked from a process that has read base and data once.

What a run does in its folder is what it always does: lock, manifest, identity, resume, steps, saves. One run in eight
also reads everything anew. Nearly every second kill comes at a call that changes the disk in a save, the others at any
time; they come early, since a run that goes on where the last was killed gets to its end in small parts.
"""

import importlib
import json
import math
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked_runs as runs

CALLS = ("mkdir", "open", "write", "fsync", "rename", "close", "unlink", "rmdir")
FARTHEST_CALL = 140
"""Of these, counted from the first save on: about two saves."""
READ_ONCE = ("load_tokenizer", "prepare", "fitting_plan", "load_base")


def kill_until(recipe: Path, kills: int, seed: int, report: Path, seconds: float = math.inf) -> None:
    """Kill runs until so many kills, or for so long; write how many came, how many inside a save, of how many runs, and
    what is wrong.

    A run that is done is compared with one that nothing happened to, and the next begins.
    """
    read = _read_once(recipe)
    length, wanted = _undisturbed(recipe.parent / f"whole{seed}", read)
    draw, seen = random.Random(seed), {"kills": 0, "inside_a_save": 0, "runs": 0, "wrong": ""}
    last = time.monotonic() + seconds
    while int(seen["kills"]) < kills and not seen["wrong"] and time.monotonic() < last:
        run = recipe.parent / f"chain{seed}-{seen['runs']}"
        seen["runs"] += 1
        newest, reach = 0, 0.3
        while not seen["wrong"]:
            before, is_aimed = left_by_saves(run), draw.random() < 0.45
            child = _forked(run, read, draw.random() < 0.125, draw.randrange(1, FARTHEST_CALL) if is_aimed else 0)
            code = _ended(child, None if is_aimed else draw.uniform(0.02, reach) * length)
            there = runs.newest_valid(run)
            if there < newest or code not in (0, -signal.SIGKILL):
                seen["wrong"] = f"{run.name}: step {newest} was saved, {there} is left; code {code}"
            newest, reach = there, 0.3 if there > newest else reach + 0.1
            if code == 0:
                break
            seen["kills"] += 1
            seen["inside_a_save"] += left_by_saves(run) - before != set()
        if not seen["wrong"] and runs.result_of(run) != wanted:
            seen["wrong"] = f"{run.name} ended with other bytes"
    seen["cpu_s"] = round(sum(os.times()[:4]))
    report.write_text(json.dumps(seen), encoding="utf-8")


def left_by_saves(run: Path) -> set[tuple[str, int]]:
    """Return what unfinished saves left: stages, and older checkpoints on their way out."""
    return {(path.name, path.stat().st_mtime_ns) for path in (run / "checkpoints").glob(".step-*")}


def _read_once(recipe: Path) -> dict[str, Any]:
    """Return a recipe, and what replaces the functions that read what it names."""
    import torch

    from qd2mora.recipe import load_recipe
    from qd2mora.training import run as training

    loaded = load_recipe(recipe)
    if loaded.memory.engine == "deepspeed":
        importlib.import_module("deepspeed")
    tokenizer = training.load_tokenizer(loaded.base.model)
    planned = training.fitting_plan(loaded, training.Processes(0, 1, torch.device("cpu")))
    results = (
        tokenizer,
        training.prepare(loaded.data, tokenizer, loaded.train.seed),
        planned,
        training.load_base(loaded.base, torch.device("cpu"), planned.layout.dtype),
    )
    return {"recipe": loaded, **dict(zip(READ_ONCE, results, strict=True))}


def _undisturbed(run: Path, read: dict[str, Any]) -> tuple[float, dict[str, bytes]]:
    """Return the seconds that a run takes, the median of three, and what it ends with."""
    times = []
    for number in range(3):
        began = time.monotonic()
        code = _ended(_forked(run.with_name(f"{run.name}-{number}"), read, False, 0), None)
        assert code == 0, f"an undisturbed run ended with {code}"
        times.append(time.monotonic() - began)
    return sorted(times)[1], runs.result_of(run.with_name(f"{run.name}-0"))


def _forked(run: Path, read: dict[str, Any], is_anew: bool, call: int) -> int:
    """Start or go on with a run in a fork; `call`: before which call of a save it kills itself. Return its id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        from qd2mora.run_folder import is_run
        from qd2mora.training import run as training

        if not is_anew:
            for name in READ_ONCE:
                setattr(training, name, _giving(read[name]))
        if call:
            _die_in_a_save(call)
        training.train(read["recipe"].model_copy(update={"output": str(run)}), resume=is_run(run))
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _giving(result: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: result


def _ended(child: int, seconds: float | None) -> int:
    """Wait, and after so many seconds kill; return the exit code, negative where a signal ended it."""
    if seconds is not None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            there, status = os.waitpid(child, os.WNOHANG)
            if there:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _die_in_a_save(call: int) -> None:
    """Let this process end before the `call`th call that changes the disk in a save, counted over all saves."""
    from qd2mora.training import checkpoint

    save, left = checkpoint.save, [call]

    def counted(name: str) -> Callable[..., Any]:
        act = getattr(os, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*args, **kwargs)

        return counting

    def saving(*args: Any) -> Any:
        plain = {name: getattr(os, name) for name in CALLS}
        for name in CALLS:
            setattr(os, name, counted(name))
        try:
            return save(*args)
        finally:
            for name, act in plain.items():
                setattr(os, name, act)

    checkpoint.save = saving
