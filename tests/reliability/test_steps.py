"""R0, G1, H1, N1, C1: a step is a function of its number, and nothing that is not finite gets past it."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import forked_runs as runs
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from qd2mora.base import load_base
from qd2mora.data import MicroBatch
from qd2mora.errors import NotFinite, WillNotFit
from qd2mora.memory.loss import RowLoss
from qd2mora.recipe import load_recipe
from qd2mora.routed.ops import RankStep
from qd2mora.training import gradient, train
from qd2mora.training.micro_batches import MicroBatches
from qd2mora.training.progress import Progress

EVERY = int(os.environ.get("GATE_EVERY", "9"))
"""Resume from each so many-th step."""
FIRST = range(1, 1 + int(os.environ["GATE_STEPS"])) if "GATE_STEPS" in os.environ else (3, 4)
"""The first bad steps: one that two more follow, and one that comes alone."""
BRIEF = ("adapter.targets=[q_proj]", f"train.steps={FIRST[-1] + 4}", "train.eval_every=1000")


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter/adapter_model.safetensors")


def distance(one: Path, two: Path) -> float:
    """Return the relative distance of two adapters."""
    first, second = adapter_of(one), adapter_of(two)
    assert first.keys() == second.keys()
    apart = sum(float((first[name] - second[name]).square().sum()) for name in first)
    return (apart / sum(float(tensor.square().sum()) for tensor in first.values())) ** 0.5


def test_no_two_rows_of_a_run_get_the_same_random_numbers(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell, keys = MicroBatches.tell_routers, []

    def telling(self: MicroBatches, part: MicroBatch) -> None:
        keys.extend(part.keys)
        tell(self, part)

    monkeypatch.setattr(MicroBatches, "tell_routers", telling)
    train(load_recipe(runs.write_recipe(made, tmp_path / "run", "adapter.method=lora", "train.eval_every=1000")))
    assert len(set(keys)) == len(keys) == 8 * 4


def test_a_resume_from_every_step_gives_the_same_bytes(made: Path, tmp_path: Path) -> None:
    """R0: three epochs, dropout, 8 steps."""
    changes = ("adapter.dropout=0.1", "train.keep_checkpoints=20", "train.steps=null", "train.epochs=3")
    recipe = runs.write_recipe(made, tmp_path / "run", *changes)
    train(load_recipe(recipe))
    wanted = runs.result_of(tmp_path / "run")
    kept = shutil.copytree(tmp_path / "run", tmp_path / "kept")
    steps = sorted(int(path.name[5:]) for path in (kept / "checkpoints").glob("step-*"))
    assert len(steps) == 18
    for step in steps[:-1:EVERY]:
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(kept, tmp_path / "run")
        for later in steps:
            if later > step:
                shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{later}")
        train(load_recipe(recipe), resume=True)
        assert runs.result_of(tmp_path / "run") == wanted, step


def test_recomputing_and_saving_change_no_byte_with_dropout(made: Path, whole: Path, tmp_path: Path) -> None:
    changes = ("adapter.dropout=0.1", "memory.checkpointing=on", "train.save_every=3")
    train(load_recipe(runs.write_recipe(made, tmp_path / "run", *changes)))
    assert runs.result_of(tmp_path / "run") == runs.result_of(whole.with_suffix(""))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_split_into_micro_batches_changes_a_step_by_rounding_only(
    dropout: float, made: Path, tmp_path: Path
) -> None:
    """G1: one update, so that rounding is not amplified; plain gradient descent sees what Adam's sign would hide."""
    for size in (1, 2, 4):
        changes = (f"adapter.dropout={dropout}", f"train.micro_batch={size}", "train.steps=1")
        train(load_recipe(runs.write_recipe(made, tmp_path / f"run{size}", *changes)))
    assert distance(tmp_path / "run1", tmp_path / "run4") <= 1e-5
    assert distance(tmp_path / "run2", tmp_path / "run4") <= 1e-5


@pytest.fixture(scope="module")
def three(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("three") / "run"
    train(load_recipe(runs.write_recipe(made, run, "train.steps=3")))
    return run


# Once in a step's first micro batch, once in a last one; the long set has the others.
@pytest.mark.parametrize("call", [1, 6, *(pytest.param(each, marks=pytest.mark.long) for each in (2, 5))])
@pytest.mark.parametrize("is_backward", [False, True])
def test_a_step_that_ran_out_of_memory_is_done_again_on_smaller_micro_batches(
    call: int, is_backward: bool, made: Path, three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H1: the fault strikes once, at a forward or a backward; batch and result stay, and a resume keeps the size."""
    forward, calls = RowLoss.forward, []

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def faulty(self: RowLoss, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        losses = forward(self, batch)
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == call:
                if not is_backward:
                    fail()
                losses.register_hook(lambda gradient: fail())
        return losses

    monkeypatch.setattr(RowLoss, "forward", faulty)
    train(load_recipe(runs.write_recipe(made, tmp_path / "faulty", "train.steps=3")))
    assert distance(three, tmp_path / "faulty") <= 1e-4  # three updates of Adam amplify rounding
    from qd2mora.disk.sealed import open_manifest

    assert open_manifest(tmp_path / "faulty/checkpoints/step-3")["progress"]["micro_batch"] == 1


@pytest.mark.parametrize("step", [0, 2])
def test_an_evaluation_that_ran_out_of_memory_is_done_again_on_smaller_micro_batches(
    step: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H1: the steps before it keep the larger micro batches, what is held out is counted once, the run goes on."""
    changes = ("train.steps=4", "train.eval_every=2", "data.tasks.0.validation=5")
    plain, faulty = tmp_path / "plain", tmp_path / "faulty"
    train(load_recipe(runs.write_recipe(made, plain, *changes)))
    forward, asked = RowLoss.forward, []

    def failing(self: RowLoss, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        asked.append((torch.is_grad_enabled(), len(batch["input_ids"])))
        is_due = sum(is_training for is_training, _ in asked) >= 2 * step
        if is_due and not torch.is_grad_enabled() and len(batch["input_ids"]) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch)

    monkeypatch.setattr(RowLoss, "forward", failing)
    train(load_recipe(runs.write_recipe(made, faulty, *changes)))
    trained = [size for is_training, size in asked if is_training]
    assert trained == [2] * 2 * step + [1] * 4 * (4 - step)
    assert distance(plain, faulty) <= 1e-4
    told = [
        [
            json.loads(line)["eval_loss"]
            for line in (run / "metrics.jsonl").read_text().splitlines()
            if "eval_loss" in line
        ]
        for run in (plain, faulty)
    ]
    assert len(told[0]) == 3
    for ours, theirs in zip(*told, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_one_row_that_does_not_fit_stops_with_a_way_out(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: RowLoss, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(RowLoss, "forward", full)
    with pytest.raises(WillNotFit, match=r"data\.max_length"):
        train(load_recipe(runs.write_recipe(made, tmp_path / "run")))


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("where", ["loss", "activation", "router", "gradient"])
def test_a_bad_step_costs_one_step_and_three_in_a_row_stop_the_run(
    where: str, first: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N1: from step `first` on, one step or three of two micro batches get a value that is not finite."""
    count, value = 1 if first % 3 else 3, float("nan" if first % 2 else "inf")
    poison(monkeypatch, where, value, range(first, first + count))
    recipe = load_recipe(runs.write_recipe(made, tmp_path / "run", *BRIEF))
    if count == 3:
        blamed = {"activation": r"the output of .*layers\.0", "router": "the output of .*q_proj"}
        with pytest.raises(NotFinite, match=f"3 bad steps in a row.*{blamed.get(where, 'the gradient of')}"):
            train(recipe)
        assert runs.newest_valid(tmp_path / "run") >= first - 1
    else:
        assert train(recipe).bad_steps == 1
        assert_finite(tmp_path / "run/adapter")
    assert_finite(tmp_path / "run/checkpoints")


def test_bad_steps_that_are_not_three_in_a_row_do_not_stop_the_run(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, "loss", float("nan"), (1, 2, 4, 5, 7, 8))
    assert train(load_recipe(runs.write_recipe(made, tmp_path / "run", *BRIEF, "train.steps=9"))).bad_steps == 6


@pytest.mark.parametrize("first", FIRST)
def test_a_moment_that_is_not_finite_is_never_saved_and_the_resume_gives_the_same_bytes(
    first: int, made: Path, brief: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N1: the update after `first` has left a moment that is not finite."""
    value, moment = float("nan" if first % 2 else "inf"), ("exp_avg", "exp_avg_sq")[first // 2 % 2]
    step, calls = torch.optim.AdamW.step, []

    def poisoned(self: torch.optim.AdamW) -> None:
        step(self)
        calls.append(1)
        if len(calls) == first:
            next(iter(self.state.values()))[moment].view(-1)[0] = value

    recipe = load_recipe(runs.write_recipe(made, tmp_path / "run", *BRIEF))
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", poisoned)
        with pytest.raises(NotFinite, match=f"{moment} is not finite"):
            train(recipe)
    assert runs.newest_valid(tmp_path / "run") == first - 1
    train(recipe, resume=True)
    assert_finite(tmp_path / "run")
    assert runs.result_of(tmp_path / "run") == runs.result_of(brief)


@pytest.fixture(scope="module")
def brief(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("brief") / "run"
    train(load_recipe(runs.write_recipe(made, run, *BRIEF)))
    return run


def poison(monkeypatch: pytest.MonkeyPatch, where: str, value: float, steps: Collection[int]) -> None:
    """Let a value that is not finite arise at one place in each micro batch of some steps."""
    forward, scores, layer, calls = RowLoss.forward, RankStep._scores, LlamaDecoderLayer.forward, []

    def is_bad() -> bool:
        return (len(calls) - 1) // 2 + 1 in steps

    def losses(self: RowLoss, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        calls.extend([1] if torch.is_grad_enabled() else [])
        found = forward(self, batch)
        if is_bad() and where == "gradient" and found.requires_grad:
            found.register_hook(lambda gradient: gradient * value)
        return found * value if is_bad() and where == "loss" else found

    def poisoned(place: str, act: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: act(*args, **kwargs) * (value if is_bad() and where == place else 1)

    monkeypatch.setattr(RowLoss, "forward", losses)
    monkeypatch.setattr(RankStep, "_scores", poisoned("router", scores))
    monkeypatch.setattr(LlamaDecoderLayer, "forward", poisoned("activation", layer))


def assert_finite(folder: Path) -> None:
    paths = list(folder.rglob("*.safetensors"))
    assert paths or not list(folder.iterdir())
    for path in paths:
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(path).values())


def test_one_bad_step_in_a_hundred_is_too_many_once_there_are_ten() -> None:
    assert not gradient.is_too_bad(Progress(step=50, bad_steps=9))
    assert gradient.is_too_bad(Progress(step=999, bad_steps=10))
    assert not gradient.is_too_bad(Progress(step=1000, bad_steps=10))
    assert gradient.is_too_bad(Progress(step=10**6, bad_steps=3, bad_in_a_row=3))


def test_an_overflow_of_float16_lowers_the_loss_scale_and_the_step_is_done_again(
    made: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qd2mora.training.run.compute_dtype", lambda base, device: torch.float16)
    monkeypatch.setattr("qd2mora.training.run.FIRST_LOSS_SCALE", 2.0**40)
    trained = train(load_recipe(runs.write_recipe(made, tmp_path / "run", "adapter.dropout=0.1")))
    from qd2mora.disk.sealed import open_manifest

    progress = open_manifest(tmp_path / "run/checkpoints/step-8")["progress"]
    assert trained.bad_steps == 0 and progress["applied"] == 8
    assert 1 <= progress["loss_scale"] < 2.0**40


def test_frozen_bytes_are_the_same_at_the_end(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C1: every frozen tensor and what it is quantised with, against the base as it is loaded."""
    found: list[nn.Module] = []
    build = RowLoss.__init__

    def remember(self: RowLoss, model: nn.Module, *settings: Any) -> None:
        build(self, model, *settings)
        found.append(model)

    monkeypatch.setattr(RowLoss, "__init__", remember)
    recipe = load_recipe(runs.write_recipe(made, tmp_path / "run", "adapter.dropout=0.1"))
    train(recipe)
    there, fresh = frozen_bytes(found[0].get_base_model()), frozen_bytes(load_base(recipe.base))  # type: ignore[operator]
    assert there.keys() == fresh.keys() and len(fresh) > 20
    assert [name for name in fresh if there[name] != fresh[name]] == []


def frozen_bytes(model: nn.Module) -> dict[str, bytes]:
    """Return the hash of every tensor that is no adapter's, with those that dequantise it."""
    hashes = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "mixture_" in name:
            continue
        parts = [tensor.detach().contiguous()]
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            parts += [state.absmax, state.code, *([state.state2.absmax, state.state2.code] if state.nested else [])]
        content = b"".join(part.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for part in parts)
        hashes[name.replace(".base_layer", "")] = hashlib.sha256(content).digest()
    return hashes


@pytest.mark.parametrize("tensor", ["mixture_A", "mixture_router_down"])
def test_a_tensor_that_gets_no_gradient_is_named(
    tensor: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C1: a detached tensor stops the run at its second update."""
    backward = torch.Tensor.backward

    def detached(self: torch.Tensor, *args: object) -> None:
        backward(self, *args)
        for name, parameter in found[0].named_parameters():
            if tensor in name and ".1." in name:
                parameter.grad = None

    found: list[nn.Module] = []
    build = RowLoss.__init__

    def remember(self: RowLoss, model: nn.Module, *settings: Any) -> None:
        build(self, model, *settings)
        found.append(model)

    monkeypatch.setattr(RowLoss, "__init__", remember)
    monkeypatch.setattr(torch.Tensor, "backward", detached)
    with pytest.raises(NotFinite, match=rf"{tensor}.* got no gradient"):
        train(load_recipe(runs.write_recipe(made, tmp_path / "run")))
