"""Two processes over gloo: the same adapter as one, alike decisions, and kills of either that lose nothing."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import forked_runs as runs
import paired_runs as pairs
import pytest
import torch
from safetensors.torch import load_file

from qd2mora.disk.sealed import unseal_text

KILLS = int(os.environ.get("GATE_RANK_KILLS", "2"))
ALLOW = ("processes",)


@pytest.fixture(scope="module")
def alone(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the recipe of a run of one process, with dropout and held-out rows that do not divide."""
    return _recipe(made, tmp_path_factory.mktemp("alone") / "run")


@pytest.fixture(scope="module")
def paired(made: Path, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the recipe of the same run of two processes; the one of one process has ended too."""
    recipe = _recipe(made, tmp_path_factory.mktemp("paired") / "run")
    pair = pairs.start_pair(pairs.train_pair, recipe, log=recipe.with_suffix(".log"))
    assert runs.outcome(runs.train_run, alone) == 0
    assert pairs.ended(pair) == [0, 0], recipe.with_suffix(".log").read_text()
    return recipe


def test_two_processes_train_the_adapter_of_one_bit_for_bit(alone: Path, paired: Path) -> None:
    """Whole micro batches are dealt out, and a sum of two is the same in either order."""
    assert runs.result_of(paired.with_suffix("")) == runs.result_of(alone.with_suffix(""))


@pytest.mark.long
def test_two_processes_whose_micro_batches_take_turns_in_each_layer_train_it_too(made: Path, tmp_path: Path) -> None:
    turns = ("memory.offload.weights=stream", "memory.accumulation=layer", "train.micro_batch=1")
    recipe, plain = (
        _recipe(made, tmp_path / name, *changes) for name, changes in (("turns", turns), ("plain", turns[2:]))
    )
    for each in (recipe, plain):
        pair = pairs.start_pair(pairs.train_pair, each, log=each.with_suffix(".log"))
        assert pairs.ended(pair) == [0, 0], each.with_suffix(".log").read_text()
    assert "memory.accumulation: layer" in recipe.with_suffix(".log").read_text()
    assert runs.result_of(recipe.with_suffix("")) == runs.result_of(plain.with_suffix(""))


def test_losses_and_held_out_losses_are_those_of_one_process(alone: Path, paired: Path) -> None:
    one, two = _lines(alone), _lines(paired)
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"tokens_per_s", "step_s", "memory"}:
            assert theirs[key] == pytest.approx(ours[key], rel=1e-6), key


def test_a_process_without_rows_moves_the_selection_biases_with_the_others(made: Path, tmp_path: Path) -> None:
    """Two short rows are one packed line: the second process has none, and is waited for in vain by no one."""
    changes = ("train.steps=3", "data.packing=true", "train.global_batch=2", "train.micro_batch=1", "adapter.dropout=0")
    change = "adapter.gates={rank: {top_k: 2}}"
    one, two = (_recipe(made, tmp_path / name, *changes, change, method="flylora") for name in ("one", "two"))
    pair = pairs.start_pair(pairs.train_pair, two, log=tmp_path / "log")
    assert runs.outcome(runs.train_run, one) == 0
    assert pairs.ended(pair) == [0, 0], (tmp_path / "log").read_text()
    ours, theirs = (load_file(each.with_suffix("") / "adapter/adapter_model.safetensors") for each in (one, two))
    biases = [name for name in ours if "select_bias" in name]
    assert biases and all(torch.equal(ours[name], theirs[name]) for name in biases)
    assert any(ours[name].any() for name in biases)


@pytest.mark.parametrize("method, change", [("flylora", "gates={rank: {top_k: 2}}"), ("mola", "allocation=2-4")])
def test_selection_biases_and_balance_losses_count_the_rows_of_both(
    method: str, change: str, made: Path, tmp_path: Path
) -> None:
    changes = ("train.steps=4", f"adapter.{change}")
    one, two = (_recipe(made, tmp_path / name, *changes, method=method) for name in ("one", "two"))
    pair = pairs.start_pair(pairs.train_pair, two, log=tmp_path / "log")
    assert runs.outcome(runs.train_run, one) == 0
    assert pairs.ended(pair) == [0, 0], (tmp_path / "log").read_text()
    _assert_close(one, two)
    penalties = [[line["penalty"] for line in _lines(recipe) if "penalty" in line] for recipe in (one, two)]
    assert penalties[0] == pytest.approx(penalties[1], rel=1e-5)
    if method == "flylora":
        biases = [tensor for name, tensor in _adapter(two).items() if "select_bias" in name]
        assert biases and any(bool(bias.any()) for bias in biases)


@pytest.mark.long
def test_a_rank_killed_in_each_phase_of_a_save_and_at_any_time_ends_the_other_and_loses_nothing(
    made: Path, tmp_path: Path
) -> None:
    """K1 on two ranks, one chain: the survivor ends by itself with code 3, no saved step is lost, the bytes are right.

    The last steps are done by one process alone.
    """
    long = ("train.steps=40", "train.eval_every=100", "data.tasks.0.validation=0")
    whole = _recipe(made, tmp_path / "whole", *long)
    assert runs.outcome(runs.train_run, whole) == 0
    recipe, draw, seen = _recipe(made, tmp_path / "chain" / "run", *long), random.Random(0), 0
    log = recipe.parent / "log"
    for phase, victim in [(phase, number % 2) for number, phase in enumerate(pairs.PHASES)]:
        codes = pairs.outcome(pairs.dying_pair, recipe, phase, victim, log=log)
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 3, (phase, codes, log.read_text())
        newest = runs.newest_valid(recipe.with_suffix(""))
        assert newest > seen, f"step {newest} after {seen}: killed in {phase}"
        seen = newest
    for _ in range(KILLS):
        victim = draw.randrange(2)
        (recipe.parent / "stepped").unlink(missing_ok=True)
        with pairs.running_pair(pairs.slow_pair, recipe, True, log=log) as pair:
            _wait_for(recipe.parent / "stepped")  # before they have met, a launcher ends the one that is left
            time.sleep(draw.uniform(0, 0.5))
            pair[victim].kill()
            codes = pairs.ended(pair)
        assert codes[1 - victim] == 3, (codes, log.read_text())
        assert runs.newest_valid(recipe.with_suffix("")) >= seen
        seen = runs.newest_valid(recipe.with_suffix(""))
    assert seen < 40
    assert runs.outcome(pairs.train_pair, recipe, True, (), ALLOW, log=log) == 0, log.read_text()
    assert runs.result_of(recipe.with_suffix("")) == runs.result_of(whole.with_suffix(""))


def test_a_run_goes_on_with_another_number_of_processes_where_that_is_allowed_and_says_so(
    made: Path, alone: Path, paired: Path, tmp_path: Path
) -> None:
    """One to two here; two to one at the end of the chain of kills."""
    recipe, log = _recipe(made, tmp_path / "run", "train.save_every=3"), tmp_path / "log"
    assert runs.outcome(_stopping_after, recipe, 3, log=log) == 75
    assert pairs.outcome(pairs.train_pair, recipe, True, log=log) == [2, 2]
    assert "processes changed since the run began (1 became 2)" in log.read_text()
    assert pairs.outcome(pairs.train_pair, recipe, True, (), ALLOW, log=log) == [0, 0], log.read_text()
    assert runs.result_of(tmp_path / "run") == runs.result_of(alone.with_suffix(""))
    manifest = unseal_text((tmp_path / "run" / "manifest.json").read_bytes(), "")
    assert manifest["lineage"] == [{"step": 3, "changed": {"processes": [1, 2]}}]


def test_a_signal_to_one_process_makes_both_save_and_stop(
    made: Path, alone: Path, paired: Path, tmp_path: Path
) -> None:
    recipe, log = _recipe(made, tmp_path / "run"), tmp_path / "log"
    with pairs.running_pair(pairs.slow_pair, recipe, log=log) as pair:
        _wait_for(tmp_path / "stepped")
        assert pair[1].pid is not None
        os.kill(pair[1].pid, signal.SIGTERM)
        assert pairs.ended(pair) == [75, 75], log.read_text()
    assert 0 < runs.newest_valid(tmp_path / "run") < 8
    assert "stopped by a signal to another process" in log.read_text()
    assert pairs.outcome(pairs.train_pair, recipe, True) == [0, 0]
    assert runs.result_of(tmp_path / "run") == runs.result_of(alone.with_suffix(""))


def test_a_step_that_is_bad_on_one_process_is_skipped_by_both(made: Path, tmp_path: Path) -> None:
    one, two = (_recipe(made, tmp_path / name, "data.tasks.0.validation=0") for name in ("one", "two"))
    pair = pairs.start_pair(pairs.bad_run, two, 4, "nan", log=tmp_path / "log")
    assert runs.outcome(pairs.bad_run, one, 8, "nan") == 0  # the fourth step of two micro batches
    assert pairs.ended(pair) == [0, 0], (tmp_path / "log").read_text()
    for recipe in (one, two):
        assert [line["bad_steps"] for line in _lines(recipe) if "bad_steps" in line] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert runs.result_of(tmp_path / "one") == runs.result_of(tmp_path / "two")


def test_a_step_that_one_process_has_no_memory_for_is_done_again_by_both(
    made: Path, alone: Path, paired: Path, tmp_path: Path
) -> None:
    recipe, log = _recipe(made, tmp_path / "run", "data.tasks.0.validation=0"), tmp_path / "log"
    plain = _recipe(made, tmp_path / "plain", "data.tasks.0.validation=0")
    pair = pairs.start_pair(pairs.bad_run, recipe, 4, "memory", log=log)
    assert runs.outcome(runs.train_run, plain) == 0
    assert pairs.ended(pair) == [0, 0], log.read_text()
    assert log.read_text().count("from step 4 on micro batches of 1") == 1
    _assert_close(recipe, plain)


@pytest.mark.parametrize("rehearsal", ["on", "off"])
def test_a_rehearsal_or_evaluation_that_one_process_has_no_memory_for_makes_both_smaller_before_step_1(
    rehearsal: str, made: Path, tmp_path: Path
) -> None:
    short, log = ("train.steps=2", "train.eval_every=2"), tmp_path / "log"
    one = _recipe(made, tmp_path / "one", *short, "train.micro_batch=1")
    recipe = _recipe(made, tmp_path / "run", *short, f"memory.rehearsal={rehearsal}")
    pair = pairs.start_pair(pairs.bad_run, recipe, 1, "memory", log=log)
    assert pairs.outcome(pairs.train_pair, one) == [0, 0]
    assert pairs.ended(pair) == [0, 0], log.read_text()
    text = log.read_text()
    assert text.count("from step 1 on micro batches of 1") == text.count("out of memory") == 1
    if rehearsal == "on":
        assert text.index("out of memory") < text.index("rehearsed: training 1 x")
    assert runs.result_of(tmp_path / "run") == runs.result_of(tmp_path / "one")


@pytest.mark.parametrize("is_late", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_full_disk_of_the_one_that_writes_ends_both_with_code_5_before_the_next_save(
    is_late: bool, made: Path, tmp_path: Path
) -> None:
    """The first step after the failure hears of it; where there is none, the next save does."""
    changes = ("train.steps=12", "train.eval_every=12", "train.log_every=1", "train.keep_best=none")
    whole = _recipe(made, tmp_path / "whole", *changes)
    recipe, log = _recipe(made, tmp_path / "run", *changes, "train.save_every=6"), tmp_path / "log"
    assert pairs.outcome(pairs.limited_pair, recipe, 60_000, is_late, log=log) == [5, 5], log.read_text()
    assert log.read_text().count("checkpoint of step 6 could not be written") == 2
    assert "step 6/12" in log.read_text() and ("step 12/12" in log.read_text()) == is_late
    assert pairs.outcome(pairs.train_pair, recipe, True, log=log) == [0, 0], log.read_text()
    assert runs.outcome(runs.train_run, whole) == 0
    assert runs.result_of(tmp_path / "run") == runs.result_of(tmp_path / "whole")


def test_a_process_that_hangs_ends_the_other(made: Path, tmp_path: Path) -> None:
    """In a step. Where the watch pauses, in saves and scores, `PATIENCE` of the collectives ends the wait."""
    never = ("train.steps=1000", "train.save_every=1000", "train.eval_every=1000")
    recipe, log = _recipe(made, tmp_path / "run", *never), tmp_path / "log"
    with pairs.running_pair(pairs.watched_pair, recipe, log=log) as pair:
        _wait_for(tmp_path / "stepped")
        time.sleep(0.5)
        record = json.loads((tmp_path / "run" / "LOCK").read_text(encoding="utf-8"))
        assert record["pid"] == pair[0].pid
        assert pairs.outcome(pairs.train_pair, recipe, True, log=tmp_path / "other") == [2, 2]  # the lock holds
        assert (tmp_path / "other").read_text().count("is in use by process") == 2
        assert pair[1].pid is not None
        os.kill(pair[1].pid, signal.SIGSTOP)
        pair[0].join(pairs.PATIENCE_S)
        assert pair[0].exitcode == 3
    assert "another process is lost" in log.read_text()


def test_processes_that_see_other_files_or_a_taken_folder_all_refuse(made: Path, paired: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    taken = paired.read_bytes()
    assert pairs.outcome(pairs.train_pair, paired, log=log) == [2, 2]
    assert log.read_text().count("continue it with --resume or replace it with --overwrite") == 2
    assert paired.read_bytes() == taken
    other = tmp_path / "other.jsonl"
    other.write_text((made / "data" / "last.jsonl").read_text().replace("word", "wort"), encoding="utf-8")
    recipe = _recipe(made, tmp_path / "run")
    assert pairs.outcome(_with_other_data, recipe, other, log=log) == [2, 2]
    assert "process 1 has another data.last than process 0" in log.read_text()
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def _with_other_data(recipe: Path, other: Path) -> None:
    pairs.train_pair(recipe, changes=(f"data.tasks.1.path={other}",) if pairs.is_second() else ())


def _stopping_after(recipe: Path, step: int) -> None:
    """Train alone, and get a signal in a step."""
    from qd2mora.training.loop import Training

    after = Training._after_step

    def stopping(self: Training) -> Any:
        if self.progress.step == step - 1:
            signal.raise_signal(signal.SIGTERM)
        return after(self)

    Training._after_step = stopping  # type: ignore[method-assign]
    runs.train_run(recipe)


def _recipe(made: Path, output: Path, *overrides: str, method: str = "d2mora") -> Path:
    plain = ("adapter.dropout=0.1", "data.tasks.0.validation=5", "data.tasks.0.metric=choice", "train.eval_every=4")
    return runs.write_recipe(made, output, *plain, *overrides, method=method)


def _lines(recipe: Path) -> list[dict[str, Any]]:
    text = (recipe.with_suffix("") / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _adapter(recipe: Path) -> dict[str, torch.Tensor]:
    return load_file(recipe.with_suffix("") / "adapter" / "adapter_model.safetensors")


def _assert_close(one: Path, two: Path) -> None:
    ours, theirs = _adapter(one), _adapter(two)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-4, atol=1e-5), name


def _wait_for(path: Path) -> None:
    until = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.01)
