"""A rehearsal finds what does not fit before the first step, and leaves no trace in the result."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from qd2mora.errors import DiskTrouble, WillNotFit
from qd2mora.memory import place
from qd2mora.memory.loss import RowLoss
from qd2mora.memory.plan import plan
from qd2mora.recipe import Recipe, load_recipe
from qd2mora.training import train
from qd2mora.training.rehearsal import is_worthwhile

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    tiny.save_base(folder / "base")
    tiny.save_tasks(folder / "data")
    lines = (folder / "data/first.jsonl").read_text(encoding="utf-8").splitlines()
    for number in (7, 23):  # rows of very different length
        row = json.loads(lines[number])
        lines[number] = json.dumps(row | {"input": " ".join([row["input"]] * 4)})
    (folder / "data/first.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def recipe(made: Path, run: Path, *changes: str, method: str = "d2mora") -> Recipe:
    path = made / f"{run.name}.yaml"
    path.write_text(tiny.recipe_text(made / "base", made / "data", run, method=method), encoding="utf-8")
    return load_recipe(path, ["train.steps=2", "train.eval_every=9", *changes])


def result_of(run: Path) -> tuple[dict[str, bytes], list[tuple[int, float]]]:
    """Return the adapter's bytes, and every step's and evaluation's losses."""
    tensors = load_file(run / "adapter/adapter_model.safetensors")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    told = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}, told


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("d2mora", ["adapter.dropout=0.1"]),
        ("d2mora", ["data.packing=true", "train.optimizer=adamw_8bit"]),
        ("d2mora", ["memory.checkpointing=1", "memory.offload={activations: cpu, weights: stream}"]),
        ("remix", []),
        ("scalezero", []),
        ("flylora", ["adapter.gates={rank: {top_k: 2}}"]),
        ("noisy_top_k", ["adapter.targets=[mlp]"]),
    ],
)
def test_a_rehearsed_run_ends_with_the_same_bytes(
    method: str, changes: list[str], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("off", "on"):
        train(recipe(made, tmp_path / name, f"memory.rehearsal={name}", *changes, method=method))
        assert ("rehearsed: training" in capsys.readouterr().out) is (name == "on")
    assert result_of(tmp_path / "on") == result_of(tmp_path / "off")


def test_a_rehearsed_resume_ends_with_the_same_bytes(made: Path, tmp_path: Path) -> None:
    """The resume goes on from step 1, with moments that a rehearsal must leave alone."""
    for name in ("off", "on"):
        settings = recipe(
            made, tmp_path / name, f"memory.rehearsal={name}", "adapter.dropout=0.1", "train.save_every=1"
        )
        train(settings)
        (tmp_path / name / "checkpoints/step-2/manifest.json").unlink()
        train(settings, resume=True)
    assert result_of(tmp_path / "on") == result_of(tmp_path / "off")


@pytest.mark.parametrize("packing", ["false", "true"])
def test_what_is_rehearsed_is_the_longest_that_the_run_meets(
    packing: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = RowLoss.forward
    seen: list[tuple[bool, int]] = []

    def watched(self: RowLoss, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append((torch.is_grad_enabled(), batch["input_ids"].numel()))
        return forward(self, batch)

    monkeypatch.setattr(RowLoss, "forward", watched)
    long = ["train.steps=8", "train.eval_every=8", f"data.packing={packing}"]
    train(recipe(made, tmp_path / "run", "memory.rehearsal=on", *long))
    for is_training, rehearsed in seen[:2]:
        assert rehearsed == max(size for kind, size in seen[2:] if kind is is_training)
    assert seen[0][0]
    assert not seen[1][0]


def failing(monkeypatch: pytest.MonkeyPatch, most_rows: int, training: bool, in_backward: bool = False) -> list[int]:
    """Let memory run out in passes of more rows, in training or in evaluation; return the rows of those that ran."""
    forward, ran = RowLoss.forward, []

    def fail(*inputs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def short(self: RowLoss, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        too_many = len(batch["input_ids"]) > most_rows and torch.is_grad_enabled() is training
        if too_many and not in_backward:
            fail()
        losses = forward(self, batch)
        ran.append(len(losses))
        if too_many:
            losses.register_hook(fail)
        return losses

    monkeypatch.setattr(RowLoss, "forward", short)
    return ran


@pytest.mark.parametrize(("training", "in_backward"), [(True, True), (False, False)])
def test_a_rehearsal_that_ran_out_of_memory_halves_the_micro_batch_and_says_so_once(
    training: bool, in_backward: bool, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The run is then one of that micro batch, to the bit."""
    train(recipe(made, tmp_path / "small", "train.micro_batch=1", "memory.rehearsal=off"))
    capsys.readouterr()
    failing(monkeypatch, 1, training, in_backward)
    train(recipe(made, tmp_path / "run", "memory.rehearsal=on"))
    told = capsys.readouterr().out
    assert told.count("out of memory: from step 1 on micro batches of 1") == told.count("out of memory") == 1
    assert told.index("out of memory") < told.index("rehearsed: training 1 x") < told.index("step 1/2")
    assert result_of(tmp_path / "run") == result_of(tmp_path / "small")


def test_a_row_that_does_not_fit_stops_the_run_before_its_first_step(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, 0, True)
    with pytest.raises(WillNotFit, match=r"data\.max_length"):
        train(recipe(made, tmp_path / "run", "memory.rehearsal=on"))
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_a_disk_that_takes_no_checkpoint_stops_the_run_before_its_first_step(made: Path, tmp_path: Path) -> None:
    """A limit on the size of files: what the disk says is free does not tell of it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
    try:
        with pytest.raises(DiskTrouble, match="rehearsed"):
            train(recipe(made, tmp_path / "run", "memory.rehearsal=on"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_memory_that_is_ample_is_not_rehearsed(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what there is: the budget named, else what is free."""
    auto = recipe(made, tmp_path / "run")
    needed = plan(auto, device=CPU).peak_bytes
    for times, is_tight in ((1.9, True), (2.1, False)):
        monkeypatch.setattr(place, "available_bytes", lambda times=times: int(times * needed))
        assert is_worthwhile(auto, plan(auto, device=CPU)) is is_tight
        assert is_worthwhile(auto, plan(auto, int(times * needed), device=CPU)) is is_tight
    for choice in ("on", "off"):
        chosen = recipe(made, tmp_path / "run", f"memory.rehearsal={choice}")
        assert is_worthwhile(chosen, plan(chosen, device=CPU)) is (choice == "on")
