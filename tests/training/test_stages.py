"""Stages of a run: what a stage leaves out keeps its bits, whatever decays, and wherever the run is broken off."""

from pathlib import Path

import pytest
import torch
from interrupted import train_in_two
from safetensors.torch import load_file
from test_training import adapter_of, assert_same_bytes, recipe
from torch import Tensor

from qd2mora.errors import InputRefused
from qd2mora.mixture.parts import part_of
from qd2mora.recipe import load_recipe
from qd2mora.report.run_contents import read_run
from qd2mora.report.run_page import run_page
from qd2mora.training import train
from qd2mora.training.stages import Stages

THREE = "train.stages=[{train: experts, steps: 2}, {train: routers}, {train: all}]"
KEPT = ("train.weight_decay=0.1", "train.keep_checkpoints=9", "train.save_every=1")


def state_after(run: Path, step: int) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step-{step}" / "adapter.safetensors")


def moved_between(run: Path, first: int, last: int) -> set[str]:
    """Return which of experts and routers changed between two checkpoints."""
    before, after = state_after(run, first), state_after(run, last)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    return {"routers" if part_of(name) == "router" or "select_bias" in name else "experts" for name in changed}


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adamw_8bit", marks=pytest.mark.long)])
def test_what_a_stage_leaves_out_keeps_its_bits_under_decay_and_over_a_resume(
    optimizer: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = (THREE, *KEPT, f"train.optimizer={optimizer}")
    train(recipe(made, tmp_path / "whole", *changes))
    assert moved_between(tmp_path / "whole", 1, 2) == {"experts"}
    assert moved_between(tmp_path / "whole", 2, 4) == {"routers"}
    assert moved_between(tmp_path / "whole", 4, 6) == {"experts", "routers"}
    train_in_two(recipe(made, tmp_path / "broken", *changes), 3, monkeypatch)
    assert_same_bytes(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.long
def test_biases_that_balance_a_load_stand_still_while_experts_alone_are_trained(made: Path, tmp_path: Path) -> None:
    changes = ("train.stages=[{train: experts, steps: 3}, {train: all}]", "adapter.gates={rank: {top_k: 2}}", *KEPT)
    train(recipe(made, tmp_path / "run", *changes, method="flylora"))
    assert moved_between(tmp_path / "run", 1, 3) == {"experts"}
    assert moved_between(tmp_path / "run", 3, 6) == {"experts", "routers"}


@pytest.mark.long
def test_one_stage_of_all_is_the_run_without_stages(made: Path, tmp_path: Path) -> None:
    train(recipe(made, tmp_path / "staged", "train.stages=[{train: all}]"))
    train(recipe(made, tmp_path / "plain"))
    assert_same_bytes(tmp_path / "staged", tmp_path / "plain")


@pytest.mark.long
def test_routers_alone_are_trained_over_experts_of_a_start(made: Path, tmp_path: Path) -> None:
    train(recipe(made, tmp_path / "first"))
    path = tmp_path / "next.yaml"
    text = (tmp_path / "first.yaml").read_text(encoding="utf-8").splitlines()
    text = [f"adapter: {{start: {tmp_path / 'first'}}}" if line.startswith("adapter:") else line for line in text]
    path.write_text("\n".join(text).replace(f"output: {tmp_path / 'first'}", f"output: {tmp_path / 'next'}"))
    train(load_recipe(path, ["train.stages=[{train: routers}]", "train.weight_decay=0.1"]))
    first, then = adapter_of(tmp_path / "first"), adapter_of(tmp_path / "next")
    assert {part_of(name) for name in first if not torch.equal(first[name], then[name])} == {"router"}


@pytest.mark.long
def test_stages_say_when_they_are_on_the_screen_and_in_the_report(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe(made, tmp_path / "run", THREE))
    printed = capsys.readouterr().out
    assert "stage: routers in steps 3 to 4" in printed
    assert "step 3: from here on routers are trained, experts stay as they are" in printed
    assert "step 5: from here on all is trained" in printed
    assert "experts (2), routers (what is left), all (what is left)" in run_page(read_run(tmp_path / "run"))


@pytest.mark.parametrize(
    ("stages", "ends"),
    [
        ("[{train: all}]", (6,)),
        ("[{train: experts, steps: 1}, {train: routers}, {train: all}]", (1, 3, 6)),
        ("[{train: experts, steps: 2}, {train: all, steps: 4}]", (2, 6)),
    ],
)
def test_stages_without_steps_share_what_is_left(
    stages: str, ends: tuple[int, ...], made: Path, tmp_path: Path
) -> None:
    found = Stages.of(recipe(made, tmp_path / "run", f"train.stages={stages}"), 6)
    assert found.ends == ends
    assert [found.number(update) for update in range(6)] == [sum(end <= update for end in ends) for update in range(6)]


@pytest.mark.parametrize(
    ("stages", "method", "words"),
    [
        ("[{train: experts, steps: 2}]", "d2mora", r"2 steps are given to 1 of 1 stages, and the run has 6"),
        ("[{train: experts, steps: 6}, {train: all}]", "d2mora", r"6 steps are given to 1 of 2 stages"),
        (
            "[{train: experts}, {train: routers}]",
            "lora",
            r"train.stages.1.train: routers, but this adapter trains none",
        ),
        ("[{train: routers}, {train: all}]", "d2mora", r"routers of a fresh adapter have nothing to choose among"),
        ("[{train: experts}, {train: all}]", "scalezero", r"scalezero opens its experts in stages of its own"),
    ],
)
def test_stages_that_cannot_be_are_refused_before_anything_is_written(
    stages: str, method: str, words: str, made: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputRefused, match=words):
        train(recipe(made, tmp_path / "run", f"train.stages={stages}", method=method))
    assert not (tmp_path / "run").exists()
