"""Experts that open when held-out losses come to rest: when that is, and that older ones keep their bits."""

from pathlib import Path

import pytest
import torch
from interrupted import train_in_two
from safetensors.torch import load_file
from test_training import assert_same_bytes, recipe
from torch import nn

from qd2mora.errors import InputRefused
from qd2mora.recipe.train import Growth
from qd2mora.training import train
from qd2mora.training.growth import Opening
from qd2mora.training.progress import Progress
from qd2mora.training.updates import PlainUpdater

GROWS = (
    *("adapter.down={experts: 3}", "adapter.up={experts: 3}", "train.eval_every=2", "train.save_every=1"),
    *("train.steps=8", "train.keep_checkpoints=9", "train.schedule=constant"),
    # No loss of this tiny run falls by half between two evaluations.
    "train.growth={patience: 1, gain: 0.5}",
)


def opening_of(num_experts: int, patience: int = 2, gain: float = 0.1) -> Opening:
    model = nn.Linear(2, 2)
    updater = PlainUpdater(dict(model.named_parameters()), torch.optim.SGD(model.parameters()))
    return Opening(model, updater, Progress(), Growth(patience=patience, gain=gain), num_experts, 10)


def test_a_task_that_rests_opens_one_expert_and_all_that_rest_are_watched_anew() -> None:
    opening = opening_of(4)
    opened = []
    for first, last in [(4, 4), (3, 4), (2, 3.9), (1, 3.8), (0.99, 3.7), (0.98, 3.6), (0.97, 3.5), (0.96, 3.5)]:
        opening.open(*opening.judge({"first": first, "last": last}))
        opened.append(opening.progress.opened)
    # `last` rests twice at the third; `first` at the sixth, where both rest and are watched anew: both at the eighth.
    assert opened == [0, 0, 1, 1, 1, 2, 2, 3]
    assert opening.judge({"first": 1, "last": 4})[0] == 3
    assert opening.judge({"first": float("nan")}) == (3, opening.progress.rest)


def test_a_run_opens_experts_at_rest_and_older_ones_keep_their_bits_over_a_resume(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe(made, tmp_path / "whole", *GROWS, method="scalezero"))
    assert "expert 2 of 3 opens" in capsys.readouterr().out
    states = {
        step: load_file(tmp_path / "whole" / "checkpoints" / f"step-{step}" / "adapter.safetensors")
        for step in range(1, 9)
    }
    # The second evaluation is the first to be compared: expert 1 opens after step 4, expert 2 after step 6.
    for name in states[1]:
        if name.rpartition(".")[0].endswith("mixture_B"):
            moved = [
                {
                    step
                    for step in range(2, 9)
                    if not torch.equal(states[step - 1][name][each], states[step][name][each])
                }
                for each in range(3)
            ]
            assert moved == [{2, 3, 4}, {5, 6}, {7, 8}], name
    train_in_two(recipe(made, tmp_path / "broken", *GROWS, method="scalezero"), 5, monkeypatch)
    assert_same_bytes(tmp_path / "whole", tmp_path / "broken")


def test_growth_of_a_method_that_does_not_grow_or_without_held_out_rows_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"train.growth: d2mora has all its experts from the start"):
        train(recipe(made, tmp_path / "run", "train.growth={}"))
    changes = ("data.tasks.0.validation=0", "data.tasks.1.validation=0")
    with pytest.raises(InputRefused, match=r"train.growth: no task holds out rows"):
        train(recipe(made, tmp_path / "run", *changes, *GROWS, method="scalezero"))
    assert not (tmp_path / "run").exists()
