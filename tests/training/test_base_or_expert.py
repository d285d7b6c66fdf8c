"""A gate labelled by whichever of base and expert does better on the row."""

import math
from pathlib import Path

import pytest
import torch
from test_training import recipe

from qd2mora.base import load_base, load_tokenizer
from qd2mora.data import TaskMix, prepare
from qd2mora.errors import InputRefused
from qd2mora.mixture import MixtureConfig, add_adapter
from qd2mora.mixture.parts import part_of
from qd2mora.objectives import objective_of
from qd2mora.recipe import Recipe
from qd2mora.recipe.train import LearnedRouting
from qd2mora.training import train
from qd2mora.training.gradient import StepGradient
from qd2mora.training.growth import Opening, Parts
from qd2mora.training.labels import expert_is_better
from qd2mora.training.micro_batches import Course, MicroBatches
from qd2mora.training.processes import Processes
from qd2mora.training.progress import Progress
from qd2mora.training.updates import PlainUpdater

GATED = ("adapter.penalties={base_or_expert: 1.0}", "adapter.down={experts: 1}", "adapter.up={experts: 1}")


def gradient_of(settings: Recipe) -> StepGradient:
    """Return what makes the gradients of a run whose expert is trained to nothing in particular."""
    tokenizer = load_tokenizer(settings.base.model)
    tasks = prepare(settings.data, tokenizer, 0)
    config = MixtureConfig.from_recipe(settings.adapter, 2)
    model = add_adapter(load_base(settings.base), config, 0)
    model.train()
    for name, tensor in model.named_parameters():
        if "mixture_B" in name:
            torch.nn.init.normal_(tensor, std=0.1, generator=torch.Generator().manual_seed(sum(map(ord, name))))
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    updater = PlainUpdater(trained, torch.optim.SGD(trained.values(), lr=0.0))
    processes = Processes(0, 1, torch.device("cpu"))
    batches = MicroBatches(
        model, updater, processes, Progress(), print, 8, 0, tokenizer.pad_token_id, 64, objective_of(settings.objective)
    )
    course = Course(TaskMix(settings.data, tasks, 0), tasks, 8, 4, None)
    opening = Opening(model, updater, batches.progress, None, Parts(), 4)
    return StepGradient(batches, course, config, None, LearnedRouting(), opening)


def set_gates(gradient: StepGradient, bias: float) -> None:
    for name, tensor in gradient.batches.updater.parameters.items():
        if "bias_down" in name:
            tensor.data.fill_(bias)
        elif "router_down" in name:
            tensor.data.zero_()


@pytest.fixture(scope="module")
def gradient(made: Path, tmp_path_factory: pytest.TempPathFactory) -> StepGradient:
    return gradient_of(recipe(made, tmp_path_factory.mktemp("gated") / "run", *GATED, method="base_gate"))


def test_a_row_is_the_experts_where_an_open_gate_has_the_lower_loss(gradient: StepGradient) -> None:
    batches = gradient.batches
    part = next(batches.of(gradient.course.rows(0), 0))
    batches.tell_routers(part)
    found = []
    for bias in (-40.0, 40.0):
        set_gates(gradient, bias)
        with torch.no_grad():
            found.append(batches.row_losses(part))
    wanted = (found[1] < found[0]).long()
    assert 0 < int(wanted.sum()) < len(wanted)
    for bias in (-40.0, 40.0):
        set_gates(gradient, bias)
        assert torch.equal(expert_is_better(batches, part), wanted)


def test_gates_learn_which_rows_are_the_experts(gradient: StepGradient) -> None:
    set_gates(gradient, 0.0)
    batches, rows = gradient.batches, gradient.course.rows(0)
    routers = [tensor for name, tensor in batches.updater.parameters.items() if part_of(name) == "router"]
    optimizer = torch.optim.Adam(routers, lr=0.3)
    values = []
    for _ in range(40):
        gradient.accumulate(rows, lambda: None)
        assert batches.routing is not None
        values.append(batches.routing.take_values()["base_or_expert"] / len(routers) * 2)
        optimizer.step()
        batches.updater.forget_gradients()
    assert values[0] == pytest.approx(math.log(2), rel=1e-5)
    assert values[-1] < 0.2


def test_gates_that_are_no_sigmoids_have_no_such_label(made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="base_or_expert: labels sigmoid gates; base_gate, not mola"):
        train(recipe(made, tmp_path / "run", GATED[0], method="mola"))
