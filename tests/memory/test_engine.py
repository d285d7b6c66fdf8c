"""DeepSpeed on a CPU: one process and two train the plain loop's adapter, and either resumes the other's checkpoint."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "reliability"))

import forked_runs as runs
import paired_runs as pairs

from qd2mora.data import dealt, lines_together
from qd2mora.errors import InputRefused
from qd2mora.memory.engine import check_engine, engine_settings, refuse_storage, unshared
from qd2mora.mixture import MixtureConfig
from qd2mora.recipe import load_recipe

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the extra is not installed: pip install -e .[deepspeed]"
)
ENGINE = ("memory.engine=deepspeed",)
SHARED = (*ENGINE, "memory.zero_stage=3", "memory.offload.optimizer=cpu", "memory.offload.weights=stream")
OFFLOAD = (*ENGINE, "memory.offload.optimizer=cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def plain(made: Path) -> Path:
    recipe = _recipe(made, made / "plain")
    assert runs.outcome(runs.train_run, recipe) == 0
    return recipe


@needs_deepspeed
def test_two_processes_under_zero_train_the_adapter_of_the_plain_loop(made: Path, plain: Path, tmp_path: Path) -> None:
    recipe = _recipe(made, tmp_path / "run", *ENGINE)
    assert pairs.outcome(pairs.train_pair, recipe, log=tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()
    _assert_close(recipe, plain)
    # Nothing of the engine's own is in the run folder.
    names = {path.name for path in (tmp_path / "run" / "checkpoints" / "step-6").iterdir()}
    assert names == {"adapter.safetensors", "optimizer.safetensors", "manifest.json"}


@needs_deepspeed
def test_checkpoints_of_the_engine_and_of_the_plain_loop_resume_each_other(
    made: Path, plain: Path, tmp_path: Path
) -> None:
    """Plain for two steps, two processes under ZeRO for two, one under ZeRO with moments on the host for two."""
    recipe, log = _recipe(made, tmp_path / "run"), tmp_path / "log"
    assert runs.outcome(_until, recipe, 2, log=log) == 75
    assert pairs.outcome(_until, recipe, 4, True, ENGINE, ("engine", "processes"), log=log) == [75, 75], log.read_text()
    # The server that is forked has trained without an engine, in the same process.
    assert runs.outcome(_until, recipe, 99, True, OFFLOAD, ("processes",), log=log) == 2
    assert "start the run in a process of its own" in log.read_text()
    assert runs.outcome(pairs.anew, _until, recipe, 99, True, OFFLOAD, ("processes",), log=log) == 0, log.read_text()
    _assert_close(recipe, plain)
    last = [load_file(path.with_suffix("") / "checkpoints/step-6/optimizer.safetensors") for path in (recipe, plain)]
    assert last[0].keys() == last[1].keys()
    for name, tensor in last[1].items():
        torch.testing.assert_close(last[0][name], tensor, rtol=1e-4, atol=1e-7)


@needs_deepspeed
def test_two_processes_that_share_weights_go_on_from_a_plain_run_and_hand_over_to_one(
    made: Path, plain: Path, tmp_path: Path
) -> None:
    """Plain for two steps, two processes under ZeRO-3 with weights and moments on the host for two, plain for two."""
    recipe, log = _recipe(made, tmp_path / "run"), tmp_path / "log"
    assert runs.outcome(_until, recipe, 2, log=log) == 75
    assert pairs.outcome(_until, recipe, 4, True, SHARED, ("engine", "processes"), log=log) == [75, 75], log.read_text()
    assert runs.outcome(_until, recipe, 99, True, (), ("engine", "processes"), log=log) == 0, log.read_text()
    _assert_close(recipe, plain)


def test_processes_that_gather_weights_together_have_as_many_micro_batches() -> None:
    parts = lines_together([3, 1, 2, 5, 4], 1, None)
    first, second = (dealt(parts, index, 2, in_step=True) for index in range(2))
    assert [weight for _, weight in first] == [1.0, 1.0, 1.0]
    assert [weight for _, weight in second] == [1.0, 1.0, 0.0]
    assert len(dealt(parts, 1, 2, in_step=False)) == 2


@needs_deepspeed
def test_what_the_engine_cannot_do_is_refused(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for change, words in (
        ("train.optimizer=adamw_8bit", r"train\.optimizer: adamw_8bit .*adamw"),
        ("data.tasks.0.metric=exact", r"zero_stage: 3 .*metric: loss"),
        ("adapter.method=scalezero", r"memory\.engine: .*scalezero"),
    ):
        recipe = load_recipe(_recipe(made, tmp_path / "run"), [*ENGINE, "memory.zero_stage=3", change])
        with pytest.raises(InputRefused, match=words):
            check_engine(recipe, MixtureConfig.from_recipe(recipe.adapter, 2))
    recipe = load_recipe(_recipe(made, tmp_path / "run"))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputRefused, match="the launcher asks for DeepSpeed"):
        check_engine(recipe, MixtureConfig.from_recipe(recipe.adapter, 2))


def test_moments_on_the_host_and_stage_three_need_the_engine(made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"offload\.optimizer.*engine"):
        load_recipe(_recipe(made, tmp_path / "run"), ["memory.offload.optimizer=cpu"])
    with pytest.raises(InputRefused, match=r"zero_stage: 3 needs engine"):
        load_recipe(_recipe(made, tmp_path / "run"), ["memory.zero_stage=3"])


def test_the_plan_says_what_is_not_shared_out(made: Path, tmp_path: Path) -> None:
    recipe = _recipe(made, tmp_path / "run")
    assert unshared(load_recipe(recipe)) == ""
    assert "4-bit weights and their quantisation state" in unshared(load_recipe(recipe, ENGINE))


def test_the_settings_leave_clipping_casting_and_compiling_to_nobody(made: Path, tmp_path: Path) -> None:
    settings = engine_settings(load_recipe(_recipe(made, tmp_path / "run"), OFFLOAD))
    assert settings["gradient_clipping"] == 0.0  # absent it would be 1.0
    assert not {"bf16", "fp16", "optimizer"} & settings.keys()
    assert settings["zero_force_ds_cpu_optimizer"] is False
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_packed_weights_that_could_be_taken_for_numbers_are_refused(dtype: torch.dtype) -> None:
    import bitsandbytes as bnb

    def linear(storage: torch.dtype) -> nn.Linear:
        made = bnb.nn.Linear4bit(64, 64, quant_type="nf4", quant_storage=storage)
        return made.to("cpu")

    refuse_storage(linear(torch.uint8))
    with pytest.raises(InputRefused, match=r"weight keeps its 4-bit weights as .*quant_storage=uint8"):
        refuse_storage(linear(dtype))


def _recipe(made: Path, output: Path, *overrides: str) -> Path:
    changes = ("adapter.dropout=0.1", "train.steps=6", "train.save_every=2", "train.eval_every=2")
    held_out = ("data.tasks.0.validation=3", "data.tasks.1.validation=2")
    return runs.write_recipe(made, output, *changes, *held_out, *overrides)


def _until(
    recipe: Path, step: int, resume: bool = False, changes: tuple[str, ...] = (), allow: tuple[str, ...] = ()
) -> None:
    """Train until a step, where the first process gets a signal."""
    import signal

    from qd2mora.training.loop import Training

    after = Training._after_step

    def stopping(self: Training) -> dict[str, float]:
        if SHARED[1] in changes:  # between passes a process holds nothing of the frozen weights
            assert any(not tensor.requires_grad and tensor.numel() == 0 for tensor in self.batches.model.parameters())
        if self.progress.step == step - 1 and os.environ.get("RANK", "0") == "0":
            signal.raise_signal(signal.SIGTERM)
        return after(self)

    Training._after_step = stopping  # type: ignore[method-assign]
    pairs.train_pair(recipe, resume, changes, allow)


def _assert_close(one: Path, two: Path) -> None:
    ours, theirs = (load_file(path.with_suffix("") / "adapter/adapter_model.safetensors") for path in (one, two))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, rtol=1e-5, atol=1e-6), name
    told = [_held_out(recipe) for recipe in (one, two)]
    assert told[0].keys() == told[1].keys() == {(step, task) for step in (0, 2, 4, 6) for task in ("first", "last")}
    for key, loss in told[1].items():
        assert told[0][key] == pytest.approx(loss, rel=1e-5), key


def _held_out(recipe: Path) -> dict[tuple[int, str], float]:
    """Return the held-out losses that a run has told, by step and task."""
    lines = [json.loads(line) for line in (recipe.with_suffix("") / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {(line["step"], task): loss for line in lines for task, loss in line.get("eval_loss", {}).items()}
