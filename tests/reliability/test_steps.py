"""R0, G1, H1, N1, C1: a step is a function of its number, and nothing that is not finite gets past it."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import forked_runs as runs
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qd2mora.base import load_base
from qd2mora.errors import NotFinite, WillNotFit
from qd2mora.memory.loss import RowLoss
from qd2mora.recipe import load_recipe
from qd2mora.training import numbers, train
from qd2mora.training.state import Progress

EVERY = int(os.environ.get("GATE_EVERY", "4"))
"""Resume from each so many-th step."""
FIRST = range(2, 2 + int(os.environ["GATE_INJECTIONS"])) if "GATE_INJECTIONS" in os.environ else (2, 4, 7)
"""The first bad steps."""


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter/adapter_model.safetensors")


def distance(one: Path, two: Path) -> float:
    """Return the relative distance of two adapters."""
    first, second = adapter_of(one), adapter_of(two)
    assert first.keys() == second.keys()
    apart = sum(float((first[name] - second[name]).square().sum()) for name in first)
    return (apart / sum(float(tensor.square().sum()) for tensor in first.values())) ** 0.5


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


@pytest.mark.parametrize("call", [1, 2, 5, 8])
@pytest.mark.parametrize("is_backward", [False, True])
def test_a_step_that_ran_out_of_memory_is_done_again_on_smaller_micro_batches(
    call: int, is_backward: bool, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H1: the fault strikes once, at a forward or a backward; batch and result stay, and a resume keeps the size."""
    train(load_recipe(runs.write_recipe(made, tmp_path / "whole", "train.steps=3")))
    forward, calls = RowLoss.forward, []

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def faulty(self: RowLoss, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        losses = forward(self, batch)
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == min(call, 6):
                if not is_backward:
                    fail()
                losses.register_hook(lambda gradient: fail())
        return losses

    monkeypatch.setattr(RowLoss, "forward", faulty)
    train(load_recipe(runs.write_recipe(made, tmp_path / "faulty", "train.steps=3")))
    assert distance(tmp_path / "whole", tmp_path / "faulty") <= 1e-4  # three updates of Adam amplify rounding
    from qd2mora.sealed import open_manifest

    assert open_manifest(tmp_path / "faulty/checkpoints/step-3")["progress"]["micro_batch"] == 1


def test_one_row_that_does_not_fit_stops_with_a_way_out(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: RowLoss, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(RowLoss, "forward", full)
    with pytest.raises(WillNotFit, match=r"data\.max_length"):
        train(load_recipe(runs.write_recipe(made, tmp_path / "run")))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_bad_step_costs_one_step_and_three_in_a_row_stop_the_run(
    where: str, count: int, first: int, value: float, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N1: from the micro batch `first` on, `count` steps of two micro batches get a value that is not finite."""
    forward, calls = RowLoss.forward, []

    def poisoned(self: RowLoss, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        losses = forward(self, batch)
        if torch.is_grad_enabled():
            calls.append(1)
            step = (len(calls) - 1) // 2 + 1
            if first <= step < first + count:
                if where == "loss":
                    return losses * value
                losses.register_hook(lambda gradient: gradient * value)
        return losses

    monkeypatch.setattr(RowLoss, "forward", poisoned)
    recipe = load_recipe(runs.write_recipe(made, tmp_path / "run", f"train.steps={max(10, first + 4)}"))
    if count == 3:
        with pytest.raises(NotFinite, match="3 bad steps in a row"):
            train(recipe)
        assert runs.newest_valid(tmp_path / "run") >= first - 1
    else:
        assert train(recipe).bad_steps == 1
        assert all(bool(tensor.isfinite().all()) for tensor in adapter_of(tmp_path / "run").values())
    for path in (tmp_path / "run/checkpoints").glob("step-*/*.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(path).values())


def test_one_bad_step_in_a_hundred_is_too_many_once_there_are_ten() -> None:
    assert not numbers.is_too_bad(Progress(step=50, bad_steps=9))
    assert numbers.is_too_bad(Progress(step=999, bad_steps=10))
    assert not numbers.is_too_bad(Progress(step=1000, bad_steps=10))
    assert numbers.is_too_bad(Progress(step=10**6, bad_steps=3, bad_in_a_row=3))


def test_an_overflow_of_float16_lowers_the_loss_scale_and_the_step_is_done_again(
    made: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qd2mora.training.compute_dtype", lambda base, device: torch.float16)
    monkeypatch.setattr("qd2mora.training.FIRST_LOSS_SCALE", 2.0**126)
    trained = train(load_recipe(runs.write_recipe(made, tmp_path / "run", "adapter.dropout=0.1")))
    from qd2mora.sealed import open_manifest

    progress = open_manifest(tmp_path / "run/checkpoints/step-8")["progress"]
    assert trained.bad_steps == 0 and progress["applied"] == 8
    assert 1 <= progress["loss_scale"] < 2.0**126


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
