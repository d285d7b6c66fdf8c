"""Routing while it is learned: uniform gates and soft ones at first, penalties that rise, starts that differ."""

import json
from pathlib import Path

import pytest
import torch
from interrupted import train_in_two
from test_training import adapter_of, assert_same_bytes, recipe
from transformers import AutoConfig

from qd2mora.base import dense_weight, load_base
from qd2mora.errors import InputRefused
from qd2mora.memory.shapes import read_shapes
from qd2mora.mixture import MixtureConfig, add_adapter, mixture_layers
from qd2mora.mixture.initialisers import neuron_slices, singular_slices
from qd2mora.mixture.phases import PLAIN, Phase
from qd2mora.recipe import Train
from qd2mora.training import train
from qd2mora.training.adapter_start import start_adapter
from qd2mora.training.updates import phase_of

FALLS = (
    "adapter.down={experts: 4}",
    "adapter.up={experts: 4}",
    "train.routing={top_k: 4, top_k_steps: 2, low_layers_later: 1}",
)
SPLIT = (
    "adapter.init=split",
    "adapter.targets=[up_proj, down_proj]",
    "adapter.down={experts: 4}",
    "adapter.up={experts: 4}",
)


def test_a_phase_is_a_function_of_the_step_and_ends() -> None:
    told = {"uniform_steps": 2, "temperature": 4.0, "anneal_steps": 4, "penalty_steps": 4}
    train = Train.model_validate({"steps": 10, "routing": told})
    assert phase_of(train, 0) == Phase(True, 4.0, 0.0)
    assert phase_of(train, 2) == Phase(False, pytest.approx(2.0), 0.5)
    assert phase_of(train, 4) == PLAIN == phase_of(Train(steps=10), 0)
    with pytest.raises(ValueError, match="go together"):
        Train.model_validate({"steps": 10, "routing": {"temperature": 2.0}})


def test_a_run_that_is_broken_off_inside_its_first_steps_ends_with_the_same_bytes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = (
        "train.routing={uniform_steps: 2, temperature: 3, anneal_steps: 5, penalty_steps: 5}",
        "adapter.penalties={entropy: 0.1}",
        "adapter.gates={down: {dropout: 0.2}}",
    )
    train(recipe(made, tmp_path / "whole", *changes))
    train_in_two(recipe(made, tmp_path / "broken", *changes), 3, monkeypatch)
    assert_same_bytes(tmp_path / "whole", tmp_path / "broken")
    train(recipe(made, tmp_path / "plain", *changes[1:]))
    plain, whole = adapter_of(tmp_path / "plain"), adapter_of(tmp_path / "whole")
    assert any(not torch.equal(plain[name], whole[name]) for name in plain)


def test_experts_fall_to_the_gates_own_number_and_the_load_of_each_step_is_told(made: Path, tmp_path: Path) -> None:
    train(recipe(made, tmp_path / "whole", *FALLS, method="mola"))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text("utf-8").splitlines()]
    loads = [line["max_load"] for line in lines if "loss" in line]
    # At the first step all experts are used by every token, later by some alone.
    assert loads[0] == 1.0 and all(1.0 < load <= 2.0 for load in loads[2:])


@pytest.mark.long
def test_a_run_that_is_broken_off_while_experts_fall_ends_with_the_same_bytes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe(made, tmp_path / "whole", *FALLS, method="mola"))
    train_in_two(recipe(made, tmp_path / "broken", *FALLS, method="mola"), 3, monkeypatch)
    assert_same_bytes(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.long
def test_a_run_whose_routers_sample_and_are_guided_moves_their_mask_and_ends_with_the_same_bytes_when_broken_off(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ("adapter.gates={down: {guidance: 1.0}}", "train.routing={estimator: grpo, draws: 2}")
    train(recipe(made, tmp_path / "whole", *changes, method="remix"))
    train_in_two(recipe(made, tmp_path / "broken", *changes, method="remix"), 3, monkeypatch)
    assert_same_bytes(tmp_path / "whole", tmp_path / "broken")
    masks = [tensor for name, tensor in adapter_of(tmp_path / "whole").items() if "select_bias" in name]
    assert masks and all(mask.any() and mask.exp().mean() == pytest.approx(1.0, abs=1e-5) for mask in masks)


def test_a_plan_counts_the_experts_that_a_run_begins_with(made: Path) -> None:
    config = AutoConfig.from_pretrained(made / "base")
    adapter = MixtureConfig(method="mixlora", target_modules=["gate_proj", "up_proj", "down_proj"])
    slots = [read_shapes(config, adapter, first).layer.slots for first in (None, 4)]
    assert slots == [2, 4]


def test_routers_that_nothing_trains_at_first_have_moments_from_the_first_checkpoint_on(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ("train.routing={uniform_steps: 4}",)
    train(recipe(made, tmp_path / "whole", *changes, method="hydralora"))
    train_in_two(recipe(made, tmp_path / "broken", *changes, method="hydralora"), 3, monkeypatch)
    assert_same_bytes(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize(
    ("method", "routing", "words"),
    [
        ("lora", "{uniform_steps: 2}", "lora has no routers"),
        ("hydralora", "{penalty_steps: 2}", "hydralora has no penalty on routing"),
        ("remix", "{uniform_steps: 2}", "remix cannot weigh all its experts alike"),
        ("hydralora", "{draws: 3}", "draws: 3, but hydralora draws no experts"),
        ("hydralora", "{estimator: grpo}", "estimator: grpo, but hydralora draws no experts"),
        ("mixlora", "{uniform_steps: 2}", "mixlora cannot weigh all its experts alike"),
        ("hydralora", "{top_k: 4, top_k_steps: 2}", "top_k: 4, but hydralora chooses no top k"),
        ("mola", "{top_k: 2, top_k_steps: 2}", "top_k: 2, but mola uses 2 already"),
    ],
)
def test_what_a_method_cannot_do_at_first_is_refused(
    method: str, routing: str, words: str, made: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputRefused, match=words):
        train(recipe(made, tmp_path / "run", f"train.routing={routing}", method=method))
    assert not (tmp_path / "run").exists()


def test_slices_are_the_weights_right_singular_vectors_at_kaimings_size() -> None:
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    rows = singular_slices(weight, 6, torch.Generator().manual_seed(1))
    wanted = torch.linalg.svd(weight.double())[2][:6] / 3**0.5
    torch.testing.assert_close(rows.double().abs(), wanted.abs(), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(rows @ rows.T, torch.eye(6) / 3, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reads_neurons", [False, True])
def test_parts_of_a_weight_are_its_neurons_and_add_up_to_it(reads_neurons: bool) -> None:
    weight = torch.randn(10, 7, generator=torch.Generator().manual_seed(0))
    parts = neuron_slices(weight, 3, reads_neurons=reads_neurons)
    assert torch.equal(sum(parts), weight)
    used = [part.abs().sum(1 - int(reads_neurons)) > 0 for part in parts]
    assert [int(each.sum()) for each in used] == ([3, 2, 2] if reads_neurons else [4, 3, 3])
    # A run of neighbours each, the first expert's first.
    assert torch.cat([each.nonzero() for each in used]).flatten().tolist() == list(range(weight.shape[reads_neurons]))


def test_experts_start_at_the_directions_of_their_own_part_of_the_pretrained_mlp(made: Path, tmp_path: Path) -> None:
    settings = recipe(made, tmp_path / "run", *SPLIT, method="mola")
    config = MixtureConfig.from_recipe(settings.adapter, num_tasks=2)
    model = add_adapter(load_base(settings.base), config, seed=0)
    start_adapter(model, config, settings, lambda: ())
    for name, layer in mixture_layers(model).items():
        weight, bank = dense_weight(layer.get_base_layer()).double(), layer.tensors("default")["mixture_A"].double()
        axis = int(name.endswith("down_proj"))
        for number, (expert, part) in enumerate(zip(bank, weight.split(172 // len(bank), axis), strict=True)):
            wanted = torch.zeros(4, weight.shape[1]).double()
            own = slice(number * len(part[0]), (number + 1) * len(part[0])) if axis else slice(None)
            wanted[:, own] = torch.linalg.svd(part, full_matrices=False)[2][:4]
            # One space: the rows of one are those of the other, turned; a third for Kaiming's size.
            turned = expert @ wanted.T
            torch.testing.assert_close(turned @ turned.T, torch.eye(4).double() / 3, rtol=1e-2, atol=2e-3)
        assert not layer.tensors("default")["mixture_B"].any()


def test_experts_that_start_at_slices_differ_and_the_adapted_model_starts_at_its_base(
    made: Path, tmp_path: Path
) -> None:
    train(recipe(made, tmp_path / "run", "adapter.init=svd", "train.steps=1", "train.learning_rate=1e-9"))
    for name, bank in adapter_of(tmp_path / "run").items():
        if name.endswith("mixture_A"):
            flat = bank.flatten(0, 1)
            torch.testing.assert_close(flat @ flat.T, torch.eye(len(flat)) / 3, rtol=1e-3, atol=1e-4)
        if name.endswith("mixture_B"):
            assert bank.abs().max() <= 2e-9
    with pytest.raises(InputRefused, match=r"adapter.init: svd has 32 directions in .*v_proj for 40 ranks"):
        train(recipe(made, tmp_path / "other", "adapter.init=svd", "adapter.rank=10"))
