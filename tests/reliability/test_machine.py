"""NI1: a resume computes with the threads of its run, and is refused where the instructions are others."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forked_runs as runs
import pytest
import torch

from qd2mora.training import machine

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart"
CHANGES = (
    f"base.model={QUICKSTART / 'base'}",
    f"data.tasks.0.path={QUICKSTART / 'data/category.jsonl'}",
    f"data.tasks.1.path={QUICKSTART / 'data/sums.jsonl'}",
    "adapter.targets=[q_proj, v_proj]",
    "adapter.down={experts: 2}",
    "adapter.up={experts: 2}",
    "data.max_length=64",
    "train.steps=3",
    "train.micro_batch=4",
    "train.global_batch=4",
)
"""A base whose sums are long enough for threads to share them."""
CONDITIONS = list(itertools.product((1, 2), ("", "default")))
"""Threads, and the capability that torch is told to have; none: the processor's own."""


@pytest.fixture(scope="module")
def begun(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the recipe of a run of one thread that a signal stopped after its second step."""
    recipe = runs.write_recipe(made, tmp_path_factory.mktemp("begun") / "run", *CHANGES)
    assert runs.outcome(runs.interrupted_run, recipe, 2) == 75
    return recipe


def _copy(recipe: Path, folder: Path) -> Path:
    """Return the recipe of a copy of a run."""
    shutil.copytree(recipe.with_suffix(""), folder / "run")
    path = folder / "run.yaml"
    text = recipe.read_text(encoding="utf-8").replace(str(recipe.with_suffix("")), str(folder / "run"))
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.long
def test_a_resume_with_other_threads_gives_the_same_bytes_and_says_so(begun: Path, tmp_path: Path) -> None:
    found = {}
    for threads, allowed in ((1, ()), (2, ()), (2, ("threads",))):
        recipe = _copy(begun, tmp_path / f"{threads}{len(allowed)}")
        log = recipe.with_suffix(".log")
        assert runs.outcome(runs.threaded_run, recipe, threads, allowed, log=log) == 0, log.read_text()
        found[threads, allowed] = (runs.result_of(recipe.with_suffix("")), "computing with 1 thread" in log.read_text())
    alone, shared, insisted = found.values()
    assert shared == (alone[0], True)
    assert alone[1] is insisted[1] is False
    assert insisted[0] != alone[0], "threads do not matter here: the test cannot fail"


def test_a_run_leaves_the_threads_of_its_process_as_they_were(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    runs.train_run(_copy(begun, tmp_path), resume=True, changes=("train.steps=2",), allowed=("train.steps", "threads"))
    assert taken == [7]


def test_instructions_are_torchs_capability_and_the_settings_of_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = machine.machine_identity(torch.device("cpu"))
    assert plain["instructions"] == torch.backends.cpu.get_cpu_capability()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert (
        machine.machine_identity(torch.device("cpu"))["instructions"]
        == f"{plain['instructions']}, ONEDNN_MAX_CPU_ISA=SSE41"
    )
    assert machine.machine_identity(torch.device("cuda")) == {}


def test_another_model_of_processor_is_told() -> None:
    device = torch.device("cpu")
    name = machine.device_name(device)
    assert machine.take_machine({"threads": None, "device": name}, device, ()) == []
    assert machine.take_machine({"threads": None, "device": "cpu"}, device, ()) == []
    (line,) = machine.take_machine({"threads": None, "device": "cpu, another"}, device, ())
    assert line.startswith(f"the run began on cpu, another, this is {name}")


@pytest.mark.skipif("GATE_MACHINES" not in os.environ, reason="minutes: processes of their own for each condition")
def test_under_any_threads_and_capability_a_resume_gives_the_same_bytes_or_is_refused_by_name(
    made: Path, tmp_path: Path
) -> None:
    for begun_under in CONDITIONS:
        recipe = runs.write_recipe(made, tmp_path / f"{begun_under}" / "run", *CHANGES)
        assert _in_process(begun_under, "runs.interrupted_run(Path(sys.argv[1]), 2)", recipe).returncode == 75
        bytes_of = {}
        for under in (begun_under, *CONDITIONS):
            copy = _copy(recipe, tmp_path / f"{begun_under}" / f"{under}{len(bytes_of)}")
            ended = _in_process(under, "runs.train_run(Path(sys.argv[1]), True)", copy)
            if under[1] != begun_under[1]:
                assert ended.returncode == 2 and "instructions changed" in ended.stderr, ended.stderr
                continue
            assert ended.returncode == 0, ended.stderr
            bytes_of[len(bytes_of)] = runs.result_of(copy.with_suffix(""))
        assert all(each == bytes_of[0] for each in bytes_of.values()), f"begun under {begun_under}"


def _in_process(under: tuple[int, str], call: str, recipe: Path) -> subprocess.CompletedProcess[str]:
    """Run one call on a recipe in a fresh interpreter, with threads and capability of its environment."""
    threads, capability = under
    folders = (ROOT, ROOT / "tests", ROOT / "tests/reliability")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(map(str, folders))}
    environment.pop("ATEN_CPU_CAPABILITY", None)
    if capability:
        environment["ATEN_CPU_CAPABILITY"] = capability
    program = f"""
import sys
from pathlib import Path
import forked_runs as runs
from qd2mora.errors import StopError
try:
    {call}
except StopError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""
    command = [sys.executable, "-c", program, str(recipe)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
