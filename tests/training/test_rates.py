"""Rates of parts: each part moves as if it alone had that learning rate, and a broken run ends with the same bytes."""

from pathlib import Path

import pytest
import torch
from interrupted import train_in_two
from test_training import assert_same_bytes, recipe
from torch import nn

from qd2mora.mixture.layer import TENSORS
from qd2mora.mixture.parts import PARTS, part_of
from qd2mora.recipe import Train
from qd2mora.recipe.optimizers import OptimizerName
from qd2mora.training import train
from qd2mora.training.updates import PlainUpdater, build_optimizer, by_rate, learning_rate

RATES = {"down": 0.5, "up": 16.0, "router": 3.0}
NAMES = {
    "layers.0.q_proj.mixture_A.default": 0.5,
    "layers.0.q_proj.mixture_B.default": 16.0,
    "layers.0.q_proj.mixture_router_down.default": 3.0,
    "layers.0.q_proj.mixture_core.default": 1.0,
    "layers.0.q_proj.lora_B.default.weight": 16.0,
    "layers.0.q_proj.lora_magnitude_vector.default.weight": 1.0,
}


def made_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(96, 64, generator=generator)) for name in NAMES}


def settings(optimizer: OptimizerName, **changes: object) -> Train:
    return Train.model_validate(
        {"steps": 4, "optimizer": optimizer, "learning_rate": 1e-3, "weight_decay": 0.1, "warmup_steps": 2} | changes
    )


def updated(train: Train, parameters: dict[str, nn.Parameter], optimizer: OptimizerName) -> None:
    updater = PlainUpdater(parameters, build_optimizer(train, optimizer, parameters))
    for step in range(4):
        for parameter in parameters.values():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
            parameter.grad = parameter.detach() + noise
        updater.update(learning_rate(train, step, 4))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_each_part_moves_as_if_its_rate_were_everybodys(optimizer: OptimizerName) -> None:
    train, start = settings(optimizer, rates=RATES), made_parameters()
    parameters = by_rate(train, start)
    assert set(parameters) == set(start)
    updated(train, parameters, optimizer)
    for name, factor in NAMES.items():
        alone = {name: made_parameters()[name]}
        updated(settings(optimizer, learning_rate=1e-3 * factor), alone, optimizer)
        torch.testing.assert_close(parameters[name], alone[name], rtol=1e-6, atol=1e-7)


def test_parameters_of_one_rate_are_one_group_and_without_rates_all_are() -> None:
    for rates, number in ((RATES, 4), (None, 1)):
        train = settings("adamw", rates=rates)
        assert len(build_optimizer(train, "adamw", by_rate(train, made_parameters())).param_groups) == number


def test_every_trained_tensor_of_an_adapter_is_a_part() -> None:
    # The start of a shared expert is never trained; scales and magnitudes have the learning rate itself.
    of_their_own = {"mixture_base_scale", "mixture_magnitude", "mixture_start_A", "mixture_start_B"}
    named = {name for name in TENSORS if not name.startswith("mixture_select_bias")}
    assert named - set(PARTS) == of_their_own
    assert part_of("base_model.model.lm_head.weight") is None


def test_a_run_with_rates_of_parts_that_was_broken_off_ends_with_the_same_bytes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ("train.rates={up: 4, router: 2}", "adapter.dropout=0.2")
    train(recipe(made, tmp_path / "whole", *changes))
    train_in_two(recipe(made, tmp_path / "broken", *changes), 3, monkeypatch)
    assert_same_bytes(tmp_path / "whole", tmp_path / "broken")


def test_rates_decide_the_weights_and_where_there_are_none_a_recipe_is_what_it_was(made: Path, tmp_path: Path) -> None:
    plain = recipe(made, tmp_path / "run")
    assert "rates" not in plain.deciding()["train"]
    assert recipe(made, tmp_path / "run", "train.rates.up=16").fingerprint() != plain.fingerprint()
