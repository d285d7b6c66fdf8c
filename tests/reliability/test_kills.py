"""K1, T1: a run that is killed or asked to stop at any moment ends as if nothing had happened."""

import importlib.util
import json
import math
import os
import random
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import forked_runs as runs
import killed_runs
import paired_runs as pairs
import pytest

KILLS = int(os.environ.get("GATE_KILLS", "30"))
WORKERS = int(os.environ.get("GATE_WORKERS", "2"))
SECONDS = float(os.environ.get("GATE_SECONDS", "inf"))
"""For how long to kill at most (under ZeRO-2 a fifth): K1 tells how many kills of how many there was time for."""
ZERO_KILLS = int(os.environ.get("GATE_ZERO_KILLS", "10"))
SHORT = ("adapter.dropout=0.1", "adapter.targets=[q_proj]", "train.global_batch=2", "train.steps=20")
SHORT += ("train.eval_every=1000",)
"""Steps that take as long as their saves."""
SIGNALLED = ("adapter.dropout=0.1", "adapter.targets=[q_proj]", "train.eval_every=4", "train.steps=5")
"""Loading takes as long as steps, evaluations and saves."""
SIGNALS = int(os.environ.get("GATE_SIGNALS", "15"))


def at(process: BaseProcess, seconds: float, number: int) -> bool:
    """Send a signal after so many seconds; False where the process had ended before."""
    process.join(seconds)
    if process.exitcode is not None:
        return False
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    return True


@pytest.fixture(scope="module")
def timed(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[float, dict[str, bytes]]:
    """Return the seconds that a run takes which is not signalled, the median of three, and what it ends with."""
    folder, times = tmp_path_factory.mktemp("timed"), []
    for number in range(3):
        recipe = runs.write_recipe(made, folder / f"run{number}", *SIGNALLED)
        began = time.monotonic()
        assert runs.outcome(runs.train_run, recipe) == 0
        times.append(time.monotonic() - began)
    return sorted(times)[1], runs.result_of(recipe.with_suffix(""))


def test_runs_killed_at_any_moment_end_with_the_same_bytes(made: Path, tmp_path: Path) -> None:
    """K1: chains of SIGKILLs until a run is done; no published checkpoint is broken, no saved step is lost."""
    recipe, log = runs.write_recipe(made, tmp_path / "run", *SHORT), tmp_path / "log"
    reports = [tmp_path / f"report{worker}" for worker in range(WORKERS)]
    share = -(-KILLS // WORKERS)
    workers = [
        runs.start(killed_runs.kill_until, recipe, share, worker, report, SECONDS, log=log)
        for worker, report in enumerate(reports)
    ]
    for process in workers:
        process.join()
    check_kills("K1", reports, log, KILLS, 0.3 if KILLS >= 60 else 0.2)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="the extra is not installed")
def test_runs_under_zero_killed_at_any_moment_end_with_the_same_bytes(made: Path, tmp_path: Path) -> None:
    """K1 where DeepSpeed shares out the moments: they are gathered into checkpoints of ours."""
    recipe = runs.write_recipe(made, tmp_path / "run", *SHORT, "memory.engine=deepspeed")
    report, log = tmp_path / "report", tmp_path / "log"
    runs.outcome(pairs.anew, killed_runs.kill_until, recipe, ZERO_KILLS, 0, report, SECONDS / 5, log=log)
    check_kills("K1 under ZeRO-2", [report], log, ZERO_KILLS, 0.1)


def check_kills(name: str, reports: list[Path], log: Path, wanted: int, share: float) -> None:
    """Compare what chains of kills report with what was asked for; such a share of kills comes inside a save."""
    assert all(report.exists() for report in reports), log.read_text()
    seen = [json.loads(report.read_text(encoding="utf-8")) for report in reports]
    assert [each["wrong"] for each in seen] == [""] * len(seen), log.read_text()
    total = {key: sum(each[key] for each in seen) for key in ("kills", "inside_a_save", "runs", "cpu_s")}
    print(name, *(f"{key}={number}" for key, number in total.items()), f"of={wanted}")
    assert total["kills"] >= wanted or SECONDS < math.inf
    assert total["kills"] > 0 and total["inside_a_save"] >= share * total["kills"]


def test_a_run_killed_before_its_first_checkpoint_ends_with_the_same_bytes(
    made: Path, whole: Path, tmp_path: Path
) -> None:
    """K1: the resume finds a run and no checkpoint."""
    recipe = runs.write_recipe(made, tmp_path / "run", "adapter.dropout=0.1")
    shutil.copytree(whole.with_suffix(""), tmp_path / "run")
    recipe.with_suffix("").joinpath("recipe.yaml").write_text(recipe.read_text())
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        shutil.rmtree(path)
    assert runs.outcome(runs.train_run, recipe, True, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert runs.result_of(tmp_path / "run") == runs.result_of(whole.with_suffix(""))


@pytest.mark.parametrize(
    "which", [signal.SIGTERM, *(pytest.param(each, marks=pytest.mark.long) for each in (signal.SIGINT, signal.SIGUSR1))]
)
def test_a_signal_at_any_moment_stops_a_run_that_resumes_to_the_same_bytes(
    which: int, made: Path, timed: tuple[float, dict[str, bytes]], tmp_path: Path
) -> None:
    """T1: exit 75 or 0 wherever the signal lands, loading and saving included."""
    (length, wanted), draw = timed, random.Random(which)
    for number in range(SIGNALS // 3):
        recipe = runs.write_recipe(made, tmp_path / f"run{number}", *SIGNALLED)
        process = runs.start(runs.listening_run, recipe, log=recipe.with_suffix(".log"))
        _wait_for(recipe.with_suffix(".listening"))
        at(process, draw.uniform(0, 1) * length, which)
        assert process.exitcode in (0, 75), recipe.with_suffix(".log").read_text()
        if process.exitcode == 75:
            assert runs.outcome(runs.train_run, recipe, True, log=recipe.with_suffix(".log")) == 0
        assert runs.result_of(recipe.with_suffix("")) == wanted


def test_a_signal_saves_where_no_save_is_due(made: Path, whole: Path, tmp_path: Path) -> None:
    recipe, log = runs.write_recipe(made, tmp_path / "run", "adapter.dropout=0.1"), tmp_path / "log"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("save_every: 1", "save_every: 1000"), encoding="utf-8")
    assert runs.outcome(runs.interrupted_run, recipe, 3, log=log) == 75, log.read_text()
    assert runs.newest_valid(tmp_path / "run") == 3
    assert runs.outcome(runs.train_run, recipe, True, log=log) == 0, log.read_text()
    assert runs.result_of(tmp_path / "run") == runs.result_of(whole.with_suffix(""))


def test_a_second_signal_ends_the_process_at_once(made: Path, tmp_path: Path) -> None:
    recipe = runs.write_recipe(made, tmp_path / "run", "train.steps=100000", "train.save_every=100000")
    process = runs.start(runs.stubborn_run, recipe)
    _wait_for(recipe.with_suffix(".listening"))
    assert process.pid is not None
    try:
        for _ in range(2):
            os.kill(process.pid, signal.SIGTERM)
            process.join(0.3)
        process.join(5)
        assert process.exitcode == -signal.SIGTERM
    finally:
        process.kill()


def test_a_run_stops_before_its_time_limit_and_resumes_to_the_same_bytes(
    made: Path, whole: Path, tmp_path: Path
) -> None:
    recipe = runs.write_recipe(made, tmp_path / "run", "adapter.dropout=0.1", "train.time_limit=1s")
    log = tmp_path / "log"
    assert runs.outcome(runs.slow_run, recipe, log=log) == 75, log.read_text()
    assert "train.time_limit" in log.read_text()
    assert runs.outcome(runs.train_run, recipe, True, ("train.time_limit=1h",)) == 0
    assert runs.result_of(tmp_path / "run") == runs.result_of(whole.with_suffix(""))


def _wait_for(path: Path) -> None:
    until = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.002)


def test_a_signal_that_a_library_takes_for_an_error_of_its_own_is_still_a_signal() -> None:
    from qd2mora.errors import InputRefused, SignalStop
    from qd2mora.stopping import listening

    with pytest.raises(SignalStop), listening():
        try:
            signal.raise_signal(signal.SIGUSR1)
        except SignalStop:
            raise InputRefused("the weights are bad") from None
