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
from qd2mora.training.growth import Opening, Parts
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
    return Opening(model, updater, Progress(), Growth(patience=patience, gain=gain), Parts(num_experts), 10)


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


def trained_in(folder: Path, bank: str, axis: int, size: int, last: int) -> list[set[int]]:
    """Return of each of `size` equal parts of a bank, along an axis, the steps in which it moved in all linears."""
    states = [load_file(folder / "checkpoints" / f"step-{step}" / "adapter.safetensors") for step in range(1, last + 1)]
    found = []
    for name in states[0]:
        if f"{bank}." in name or name.endswith(bank):
            parts = [state[name].chunk(size, axis) for state in states]
            moved = [
                {step for step in range(2, last + 1) if not torch.equal(parts[step - 2][part], parts[step - 1][part])}
                for part in range(len(parts[0]))
            ]
            found.append(moved)
    assert found and all(each == found[0] for each in found), found
    return found[0]


RESTS = ("train.eval_every=2", "train.save_every=1", "train.steps=8", "train.keep_checkpoints=9")
OPENS = [{2, 3, 4}, {5, 6}, {7, 8}]
"""As in the test above, of three parts."""
AFTER = [{2, 3, 4}, {6}, {8}]
"""A down expert has no gradient while its up expert is zero."""


@pytest.mark.parametrize(
    ("method", "changes", "parts"),
    [
        ("loramoe", ["adapter.down={experts: 3}", "adapter.up={experts: 3}"], {"A": (0, AFTER), "B": (0, OPENS)}),
        pytest.param(
            "hydralora",
            ["adapter.up={experts: 3}", "adapter.penalties={diversity_cos: 1.0}"],
            {"A": (0, [OPENS[0]]), "B": (0, OPENS)},
            marks=pytest.mark.long,
        ),
        ("mora", ["adapter.rank=6", "adapter.gates={rank: {top_k: 2}}"], {"A": (1, OPENS), "B": (2, OPENS)}),
        pytest.param(
            "flylora",
            ["adapter.rank=6", "adapter.gates={rank: {top_k: 4}}", "train.growth.ranks=2"],
            {"B": (2, OPENS)},
            marks=pytest.mark.long,
        ),
    ],
)
def test_what_is_not_open_keeps_its_bits_in_other_mixtures_too(
    method: str, changes: list[str], parts: dict[str, tuple[int, list[set[int]]]], made: Path, tmp_path: Path
) -> None:
    rests = ("train.growth={patience: 1, gain: 0.5}", "train.schedule=constant", "data.tasks.0.group=0")
    train(recipe(made, tmp_path / "run", *rests, *RESTS, "data.tasks.1.group=1", *changes, method=method))
    for bank, (axis, wanted) in parts.items():
        assert trained_in(tmp_path / "run", f"mixture_{bank}", axis, len(wanted), 8) == wanted


def test_linears_with_fewer_experts_open_them_as_far_apart_and_ranks_a_few_at_a_time() -> None:
    opened = [
        [int(Parts(8).trained("mixture_B", torch.zeros(size, 3, 2), stage).sum()) for stage in range(8)]
        for size in (8, 2, 1)
    ]
    assert opened == [[1] * 8, [1, 0, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    parts = Parts(3, ranks=4, of=10)
    assert [parts.trained("mixture_A", torch.zeros(1, 10, 5), stage).sum() for stage in range(3)] == [4, 4, 2]
    assert parts.trained("mixture_B", torch.zeros(1, 5, 10), 2).shape == (1, 1, 10)
    assert parts.trained("mixture_router_rank", torch.zeros(10, 5), 1) is None
    assert parts.words(2) == "ranks 9 to 10 of 10 open"


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("d2mora", [], "train.growth: d2mora mixes down experts that are not zero"),
        ("peam", [], "train.growth: peam has an expert for each task"),
        ("mixlora", [], "train.growth: mixlora has no experts that are sums of ranks"),
        ("lora", [], "train.growth: lora has no experts that could open"),
        ("loramoe", ["train.growth={ranks: 2}"], "train.growth.ranks: loramoe opens experts and gates no ranks"),
        ("mora", ["train.growth={ranks: 8}", "adapter.rank=8"], "train.growth.ranks: 8 will not do: from 1 to 7 of 8"),
        ("loramoe", ["train.weight_decay=0.1"], "train.weight_decay: 0.1 would move closed experts"),
        ("loramoe", ["train.stages=[{train: all}]"], "train.stages: loramoe opens its experts in stages"),
        ("loramoe", ["memory.engine=deepspeed"], "memory.engine: deepspeed"),
    ],
)
def test_growth_of_what_cannot_is_refused(
    method: str, changes: list[str], words: str, made: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputRefused, match=words):
        train(recipe(made, tmp_path / "run", "train.growth={}", *changes, method=method))
    assert not (tmp_path / "run").exists()


def test_growth_without_held_out_rows_is_refused(made: Path, tmp_path: Path) -> None:
    changes = ("data.tasks.0.validation=0", "data.tasks.1.validation=0")
    with pytest.raises(InputRefused, match=r"train.growth: no task holds out rows"):
        train(recipe(made, tmp_path / "run", *changes, *GROWS, method="scalezero"))
    assert not (tmp_path / "run").exists()
