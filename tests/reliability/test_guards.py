"""W1, F1, U1, LG1: two runs, a full disk, a hang, a lost device, a log that cannot be written."""

import errno
import itertools
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import forked_runs as runs
import pytest
import small

from qd2mora.disk.lock import locked
from qd2mora.errors import DamagedFile, DeviceLost, DiskTrouble, InputRefused
from qd2mora.memory.loss import RowLoss
from qd2mora.recipe import load_recipe
from qd2mora.run_folder import RunFolder
from qd2mora.training import train
from qd2mora.training.checkpoint import Saver
from qd2mora.training.clock import Watchdog
from qd2mora.training.progress import Progress

SIZES = int(os.environ.get("GATE_SIZES", "12"))
ERRNOS = ["ENOSPC", "EDQUOT", "EIO", "EROFS", "EFBIG", "EACCES", "ENOMEM", "ESTALE", "ENOTCONN", "ETIMEDOUT"]
ERRNOS += ["EPERM", "ENOENT", "EINTR", "ENXIO", "EBADF", "EAGAIN", "EBUSY", "EEXIST", "EXDEV", "ENODEV", "ENOTDIR"]
ERRNOS += ["EISDIR", "EINVAL", "ENFILE", "EMFILE", "ETXTBSY", "EMLINK", "EPIPE", "EDEADLK", "ENAMETOOLONG", "ENOLCK"]
ERRNOS += [
    "ENOSYS",
    "ENOTEMPTY",
    "ELOOP",
    "EOVERFLOW",
    "EOPNOTSUPP",
    "ECONNRESET",
    "EHOSTDOWN",
    "EREMOTEIO",
    "ENOMEDIUM",
]
ERRNOS = ERRNOS[: int(os.environ.get("GATE_ERRNOS", "3"))]
PAIRS = int(os.environ.get("GATE_PAIRS", "4"))


def hold(path: Path) -> None:
    with locked(path):
        time.sleep(60)


def compete(path: Path, meeting: Path, name: str) -> None:
    """Take the lock when another is about to as well, and keep it until that one was refused."""
    (meeting / f"ready{name}").touch()
    _until(lambda: len(list(meeting.glob("ready*"))) == 2)
    try:
        with locked(path):
            _until((meeting / "refused").exists)
    except InputRefused:
        (meeting / "refused").touch()
        raise


def _until(is_so: Callable[[], bool]) -> None:
    last = time.monotonic() + 10
    while not is_so() and time.monotonic() < last:
        time.sleep(0.001)


def test_of_two_at_once_one_runs_and_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    """W1."""
    for number in range(PAIRS):
        path, meeting = tmp_path / f"run{number}" / "LOCK", tmp_path / f"meeting{number}"
        meeting.mkdir()
        pair = [runs.start(compete, path, meeting, name) for name in "ab"]
        for process in pair:
            process.join()
        assert sorted(process.exitcode for process in pair) == [0, 2]
        assert not path.exists()
    for number in range(PAIRS // 5):
        path = tmp_path / f"stale{number}" / "LOCK"
        holder = runs.start(hold, path)
        while not (path.exists() and path.read_bytes()):
            time.sleep(0.01)
        with pytest.raises(InputRefused, match=f"in use by process {holder.pid} "), locked(path):
            pass
        holder.kill()
        holder.join()
        with locked(path):
            pass


@pytest.mark.parametrize("name", ERRNOS)
@pytest.mark.parametrize("call", ["write", "fsync", "rename", "open", "replace", "close"])
def test_a_disk_error_anywhere_in_a_save_leaves_the_old_checkpoints(
    call: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F1: at each such call of a save."""
    small.save(tmp_path, 3)
    real, number = getattr(os, call), getattr(errno, name)
    for which in itertools.count(1):
        calls: list[int] = []

        def failing(*args: object, at: int = which, seen: list[int] = calls, **options: object) -> object:
            seen.append(1)
            if len(seen) == at:
                raise OSError(number, os.strerror(number))
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            saver = Saver(tmp_path, 2, small.source_at(4))
            try:
                saver.begin(Progress(step=4, applied=4))
                saver.finish()
                is_told = False
            except DiskTrouble as error:
                is_told = "earlier checkpoints are whole" in str(error)
            except DamagedFile:  # what was written could not be read back
                is_told = call == "open"
        # The last calls clear up: their failure costs nothing and is not told.
        step, problems = small.load(tmp_path)
        assert is_told or step == 4
        assert step in (3, 4) and not problems
        assert not list(tmp_path.glob(".step-*.partial"))
        shutil.rmtree(tmp_path / "step-4", ignore_errors=True)
        if len(calls) < which:
            break


def test_a_file_that_may_not_grow_beyond_any_size_leaves_the_old_checkpoints(tmp_path: Path) -> None:
    """F1: sizes over the whole range of a save; where all files fit, the new one is there."""
    small.save(tmp_path, 3)
    largest = max(path.stat().st_size for path in (tmp_path / "step-3").iterdir())
    ended = []
    for size in sorted({(largest + 64) * number // SIZES for number in range(SIZES + 1)}):
        ended.append(runs.outcome(limited_save, tmp_path, size, log=tmp_path / "log"))
        assert ended[-1] == (5 if size < largest else 0), (tmp_path / "log").read_text()
        assert small.load(tmp_path) == (4 if size >= largest else 3, [])
        assert not list(tmp_path.glob(".step-*"))
    assert {*ended} == {0, 5}


def limited_save(folder: Path, size: int) -> None:
    """Save step 4 where no file may grow beyond so many bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    saver = Saver(folder, 2, small.source_at(4))
    try:
        saver.begin(Progress(step=4, applied=4))
        saver.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))  # for the log


def test_a_full_disk_ends_a_run_with_code_5_and_the_resume_gives_the_same_bytes(
    made: Path, whole: Path, tmp_path: Path
) -> None:
    recipe = runs.write_recipe(made, tmp_path / "run", "adapter.dropout=0.1")
    assert runs.outcome(runs.limited_run, recipe, 60_000, log=tmp_path / "log") == 5, (tmp_path / "log").read_text()
    assert runs.outcome(runs.train_run, recipe, True, log=tmp_path / "log") == 0
    assert runs.result_of(tmp_path / "run") == runs.result_of(whole.with_suffix(""))


def test_a_result_that_does_not_fit_ends_with_code_5_and_leaves_the_old_one(
    made: Path, whole: Path, tmp_path: Path
) -> None:
    """F1: adapter and tokenizer are written by libraries, whose errors of the disk are of types of their own."""
    recipe, log = runs.write_recipe(made, tmp_path / "run", "adapter.dropout=0.1"), tmp_path / "log"
    assert runs.outcome(runs.train_run, recipe) == 0
    names = ["adapter/adapter_model.safetensors", "tokenizer.json"]
    sizes = [(tmp_path / "run" / name).stat().st_size for name in names]
    for size in (sizes[0] // 2, sizes[0] - 1, sizes[1] // 2, 64):
        assert runs.outcome(limited_result, recipe, size, log=log) == 5, log.read_text()
        assert "could not be written" in log.read_text() and "Traceback" not in log.read_text()
        assert runs.result_of(tmp_path / "run") == runs.result_of(whole.with_suffix(""))
        log.unlink()
    assert runs.outcome(limited_result, recipe, max(sizes) + 1, log=log) == 0, log.read_text()


def limited_result(recipe: Path, size: int) -> None:
    """Go on with a run that is over, where no file of its result may grow beyond so many bytes."""
    import resource

    from qd2mora.training import run as training

    save = training.save_result

    def limited(*args: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            save(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    training.save_result = limited
    runs.train_run(recipe, True)


def test_a_log_that_cannot_be_written_stops_nothing(
    made: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LG1."""

    class FullLog(RunFolder):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self.metrics = Path("/dev/full")

    monkeypatch.setattr("qd2mora.training.run.RunFolder", FullLog)
    train(load_recipe(runs.write_recipe(made, tmp_path / "run", "adapter.dropout=0.1")))
    assert runs.result_of(tmp_path / "run") == runs.result_of(whole.with_suffix(""))


def test_a_hung_step_ends_with_code_3_and_a_stack(made: Path, tmp_path: Path) -> None:
    """U1."""
    recipe, log = runs.write_recipe(made, tmp_path / "run"), tmp_path / "log"
    began = time.monotonic()
    assert runs.outcome(runs.hanging_run, recipe, log=log) == 3
    assert time.monotonic() - began < 30
    assert "no sign of life" in log.read_text() and "hanging" in log.read_text()
    assert runs.newest_valid(tmp_path / "run") == 5


def test_a_process_that_was_stopped_and_goes_on_is_not_taken_for_hung(tmp_path: Path) -> None:
    process = runs.start(runs.resting, tmp_path / "beaten", log=tmp_path / "log")
    _until((tmp_path / "beaten").exists)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()


def test_silence_beyond_the_limit_is_told_once() -> None:
    gave_up: list[float] = []
    with Watchdog(0.4, gave_up.append) as watchdog:
        for _ in range(10):
            watchdog.beat()
            time.sleep(0.01)
        time.sleep(0.2)
        assert not gave_up
        time.sleep(0.6)
    assert len(gave_up) == 1


def test_a_process_that_computes_on_a_cpu_is_not_taken_for_hung() -> None:
    gave_up: list[float] = []
    with Watchdog(0.4, gave_up.append, is_on_cpu=True) as watchdog:
        _beat(watchdog, 0.01)
        until = time.process_time() + 1.5
        while time.process_time() < until:
            pass
        assert not gave_up
        time.sleep(1.0)
    assert len(gave_up) == 1


def test_on_a_gpu_processor_time_is_no_sign_of_life() -> None:
    gave_up: list[float] = []
    with Watchdog(0.4, gave_up.append) as watchdog:
        _beat(watchdog, 0.01)
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            pass
    assert len(gave_up) == 1


def test_the_limit_is_that_of_training_however_short_held_out_batches_and_updates_are() -> None:
    watchdog = Watchdog(0.1)
    for _ in range(6):
        time.sleep(0.1)
        watchdog.beat()
        for _ in range(20):
            watchdog.alive()
        with watchdog.paused():
            pass
    assert watchdog.limit_s >= 1.0


def test_a_run_counts_only_micro_batches_of_training(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four micro batches a step and eight steps, whatever was evaluated, updated and saved in between."""
    beats: list[int] = []
    monkeypatch.setattr(Watchdog, "beat", lambda self: beats.append(1))
    overrides = ["data.tasks.0.validation=4", "train.eval_every=1", "train.micro_batch=1", "train.global_batch=4"]
    train(load_recipe(runs.write_recipe(made, tmp_path / "run", *overrides)))
    assert len(beats) == 4 * 8


@pytest.mark.parametrize(
    ("step", "words"), [(0, "begins anew; a smaller train.save_every"), (7, "goes on after step 7")]
)
def test_who_gives_up_says_where_a_resume_goes_on(
    step: int, words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    Watchdog(last_saved=lambda: step)._end_process(130.0)
    assert codes == [3]
    assert words in capfd.readouterr().err.splitlines()[-1]


def _beat(watchdog: Watchdog, wait_s: float) -> None:
    for _ in range(10):
        watchdog.beat()
        time.sleep(wait_s)


@pytest.mark.parametrize("is_backward", [False, True])
def test_nothing_is_saved_after_a_device_error(
    is_backward: bool, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = RowLoss.forward, []

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def faulty(self: RowLoss, batch: dict[str, object]) -> object:
        losses = forward(self, batch)
        calls.append(1)
        if len(calls) == 7:
            if not is_backward:
                fail()
            losses.register_hook(lambda gradient: fail())
        return losses

    monkeypatch.setattr(RowLoss, "forward", faulty)
    with pytest.raises(DeviceLost, match="CUDA error"):
        train(load_recipe(runs.write_recipe(made, tmp_path / "run")))
    assert runs.newest_valid(tmp_path / "run") == 3
