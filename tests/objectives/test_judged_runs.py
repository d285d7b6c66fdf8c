"""What holds for a run holds for each objective: resumes, splits, memory that runs out, evaluations, the best one."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import judged_runs as runs
import pytest
import tiny
import torch
from interrupted import train_in_two

from qd2mora.errors import InputRefused, SignalStop
from qd2mora.memory.loss import RowLoss
from qd2mora.objectives import objective_of
from qd2mora.objectives import reference as references
from qd2mora.objectives.head import RowScore
from qd2mora.report.run_contents import read_run
from qd2mora.report.run_page import run_page
from qd2mora.stopping import BEFORE_A_STEP
from qd2mora.training import train
from qd2mora.training.clock import Watchdog
from qd2mora.training.micro_batches import MicroBatches

LIVE = "objective.reference=live"
LONG = pytest.mark.long


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    tiny.save_base(folder / "base")
    runs.save_rows(folder / "data")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of each test's own."""
    monkeypatch.setenv("QD2MORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def started(made: Path, request: pytest.FixtureRequest) -> Path:
    """What is made, with the run that a head over experts goes on from where the test's kind is that."""
    if request.getfixturevalue("kind") == "experts" and not (made / "inner").exists():
        train(runs.inner_of(made))
    return made


@pytest.mark.parametrize("kind", ["dpo", *(pytest.param(kind, marks=LONG) for kind in runs.KINDS[1:])])
def test_a_resumed_run_is_the_unbroken_one_and_says_what_it_measured(
    kind: str, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropout, recipe = "adapter.dropout=0.1", runs.recipe_of(started, tmp_path / "whole", kind, "adapter.dropout=0.1")
    train(recipe)
    train_in_two(runs.recipe_of(started, tmp_path / "two", kind, dropout), 3, monkeypatch)
    assert runs.bytes_of(tmp_path / "two") == runs.bytes_of(tmp_path / "whole")
    measured, lines = runs.measured_of(recipe), runs.lines_of(tmp_path / "whole")
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    assert all(0 <= line["eval_measures"]["pick"][measured] <= 1 for line in evaluations)
    if measured == "accuracy":
        assert evaluations[-1]["eval_loss"]["pick"] < evaluations[0]["eval_loss"]["pick"]
        # Of nine rows that it never saw; those that weigh means of tokens are not done in six steps.
        least = 0.85 if kind in ("orpo", "simpo") else 0.95
        assert evaluations[-1]["eval_measures"]["pick"][measured] >= least
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 6 and all(measured in line for line in steps)
    kept = next((tmp_path / "whole" / "best").glob("step-*"))
    assert kept.name == f"step-{min(evaluations[1:], key=lambda line: line['eval_loss']['pick'])['step']}"
    seen = run_page(read_run(tmp_path / "whole"))
    assert f"{measured} by task" in seen and "held-out loss by task" in seen and "Not shown" not in seen
    changed = "objective.beta" if recipe.objective.beta else "train.warmup_steps"
    with pytest.raises(InputRefused, match=rf"{re.escape(changed)} changed since the run began"):
        train(runs.recipe_of(started, tmp_path / "whole", kind, dropout, f"{changed}=1"), resume=True)


@pytest.mark.long
@pytest.mark.parametrize("kind", runs.KINDS)
def test_micro_batches_of_any_size_make_the_same_step(
    kind: str, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so does one that ran out of memory, which is halved."""
    recipe = runs.recipe_of(started, tmp_path / "one", kind, "train.micro_batch=1", "train.steps=3")
    train(recipe)
    objective = objective_of(recipe.objective)
    runs_rows, name = (RowScore, "forward") if objective.has_head else (RowLoss, "by_token")
    forward, calls = getattr(runs_rows, name), []

    def failing(self: Any, batch: dict[str, Any]) -> Any:
        if torch.is_grad_enabled():
            calls.append(len(batch["input_ids"]))
            if len(calls) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch)

    monkeypatch.setattr(runs_rows, name, failing)
    train(runs.recipe_of(started, tmp_path / "four", kind, "train.micro_batch=4", "train.steps=3"))
    lines = objective.lines
    assert calls[:3] == [4 * lines] * 3 and calls[3:5] == [2 * lines] * 2
    one, four = runs.trained_of(tmp_path / "one"), runs.trained_of(tmp_path / "four")
    # Adam's first steps are signs of gradients: near zero, rounding decides.
    assert all(torch.allclose(one[name], four[name], atol=2e-3) for name in one)
    first = [next(line for line in runs.lines_of(tmp_path / name) if "loss" in line) for name in ("one", "four")]
    for name in {"loss", "grad_norm", runs.measured_of(recipe)}:
        assert first[0][name] == pytest.approx(first[1][name], rel=1e-4), name


@LONG
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_kept_reference_says_what_a_live_one_does(kind: str, made: Path, tmp_path: Path, cache: Path) -> None:
    train(runs.recipe_of(made, tmp_path / "kept", kind))
    assert list((cache / "reference").iterdir())
    train(runs.recipe_of(made, tmp_path / "live", kind, LIVE))
    for ours, theirs in zip(runs.lines_of(tmp_path / "kept"), runs.lines_of(tmp_path / "live"), strict=True):
        for name in ("loss", "grad_norm", "margin", "accuracy"):
            assert ours.get(name, 0) == pytest.approx(theirs.get(name, 0), rel=1e-3, abs=1e-5)


@LONG
@pytest.mark.parametrize("kind", runs.KINDS)
def test_a_rehearsed_run_is_the_same_run(kind: str, started: Path, tmp_path: Path) -> None:
    for switch in ("on", "off"):
        train(runs.recipe_of(started, tmp_path / switch, kind, f"memory.rehearsal={switch}", "train.steps=2"))
    assert runs.bytes_of(tmp_path / "on") == runs.bytes_of(tmp_path / "off")


@pytest.mark.parametrize("kind", runs.KINDS)
def test_rows_that_are_judged_or_answered_as_a_whole_are_not_packed(kind: str, made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"data(\.packing)?: .*(as a whole)"):
        runs.recipe_of(made, tmp_path / "run", kind, "data.packing=true")


@LONG
def test_what_the_reference_says_is_computed_once_and_a_damaged_entry_anew(
    made: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("qd2mora.training.kept_reference.CHUNK", 16)
    written: list[int] = []
    write = references.KeptLosses.write

    def counting(self: references.KeptLosses, lines: Any, losses: Any) -> None:
        written.append(len(lines))
        write(self, lines, losses)

    monkeypatch.setattr(references.KeptLosses, "write", counting)
    train(runs.recipe_of(made, tmp_path / "first", "dpo"))
    assert len(written) >= 3
    number = len(written)
    train(runs.recipe_of(made, tmp_path / "again", "dpo", "objective.beta=0.1"))
    assert len(written) == number and runs.bytes_of(tmp_path / "again") == runs.bytes_of(tmp_path / "first")
    damaged = sorted((cache / "reference").glob("*/values.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    train(runs.recipe_of(made, tmp_path / "third", "dpo"))
    assert len(written) == number + 1 and "computed anew" in caplog.text
    assert runs.bytes_of(tmp_path / "third") == runs.bytes_of(tmp_path / "first")


@LONG
@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.parametrize("reference", ["kept", "live"])
def test_where_a_run_goes_on_from_an_adapter_that_is_its_reference(
    kind: str, reference: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss at step 0 is that of equal models; the start is not, and a resume still knows it."""
    train(runs.recipe_of(made, tmp_path / "start", "orpo"))
    adapter = f"{{start: {tmp_path / 'start'}}}"
    change = f"objective.reference={reference}"
    recipe = runs.recipe_of(made, tmp_path / "next", kind, change, adapter=adapter)
    train_in_two(recipe, 3, monkeypatch)
    train(runs.recipe_of(made, tmp_path / "whole", kind, change, adapter=adapter))
    assert runs.bytes_of(tmp_path / "next") == runs.bytes_of(tmp_path / "whole")
    first = next(line for line in runs.lines_of(tmp_path / "next") if "eval_loss" in line)
    assert first["eval_loss"]["pick"] == pytest.approx({"dpo": 0.6931472, "kto": 0.5}[kind], abs=1e-5)
    assert first["eval_measures"]["pick"].get("margin", 0) == pytest.approx(0, abs=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("method", ["remix", "hydralora", "flylora", "dora"])
def test_other_methods_learn_a_preference_too(method: str, made: Path, tmp_path: Path) -> None:
    change = "adapter.gates={rank: {top_k: 2}}" if method == "flylora" else "adapter.dropout=0"
    adapter = f"{{method: {method}, rank: 4, alpha: 8, targets: [q_proj, v_proj]}}"
    train(runs.recipe_of(made, tmp_path / "run", "dpo", LIVE, change, "train.steps=2", adapter=adapter))
    lines = runs.lines_of(tmp_path / "run")
    assert lines[0]["eval_loss"]["pick"] == pytest.approx(0.6931472, abs=1e-5)
    assert lines[-1]["eval_loss"]["pick"] < 0.6931472


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_signal_before_the_first_step_ends_the_evaluation_at_its_next_batch(
    kind: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, said = runs.recipe_of(made, tmp_path / "run", kind, "train.micro_batch=1", LIVE), MicroBatches.said
    seen: list[int] = []

    def interrupted(self: MicroBatches, *given: Any) -> Any:
        seen.append(self.progress.step)
        if len(seen) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return said(self, *given)

    with monkeypatch.context() as patched, pytest.raises(SignalStop, match=f"before the first step; {BEFORE_A_STEP}"):
        patched.setattr(MicroBatches, "said", interrupted)
        train(recipe)
    # The rehearsal of the largest batch, and of an evaluation one batch of each of its two passes at most.
    assert len(seen) <= 2 and BEFORE_A_STEP in capsys.readouterr().err
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    train(recipe, resume=True)
    assert [line["step"] for line in runs.lines_of(tmp_path / "run") if "eval_loss" in line] == [0, 3, 6]


def test_the_pass_for_the_baseline_gives_a_sign_of_life_with_each_micro_batch(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signs: list[int] = []
    alive, baseline = Watchdog.alive, MicroBatches.baseline
    counts: list[tuple[int, int]] = []

    def counted(self: MicroBatches, rows: Any, *given: Any) -> float:
        before = len(signs)
        found = baseline(self, rows, *given)
        counts.append((len(signs) - before, len(rows)))
        return found

    monkeypatch.setattr(Watchdog, "alive", lambda self: (signs.append(1), alive(self))[1])
    monkeypatch.setattr(MicroBatches, "baseline", counted)
    train(runs.recipe_of(made, tmp_path / "run", "kto", "train.micro_batch=1", "train.steps=2", LIVE))
    assert len(counts) > 2 and all(signs == number > 1 for signs, number in counts)
