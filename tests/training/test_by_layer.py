"""Micro batches that take turns in each layer: the same losses and gradients to the bit, and one fetch for all."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_training import recipe
from torch import Tensor

from qd2mora.base import load_base, load_tokenizer
from qd2mora.data import TaskMix, prepare
from qd2mora.memory.streaming import LayerStream
from qd2mora.memory.techniques import Layout, prepare_base
from qd2mora.mixture import MixtureConfig, add_adapter
from qd2mora.objectives import objective_of
from qd2mora.objectives.head import add_head
from qd2mora.recipe import Recipe
from qd2mora.recipe.train import LearnedRouting
from qd2mora.training import train
from qd2mora.training.gradient import StepGradient
from qd2mora.training.growth import Opening, Parts
from qd2mora.training.micro_batches import Course, MicroBatches
from qd2mora.training.processes import Processes
from qd2mora.training.progress import Progress
from qd2mora.training.updates import PlainUpdater

CPU = torch.device("cpu")
ROWS = 8
PLAIN = Layout(2, 5, torch.float32, on_gpu=False)
AWAY = replace(PLAIN, stream=True, offload_activations=True, rows_by_layer=ROWS)


@dataclass
class Found:
    """What a step came to."""

    loss: Tensor
    gradients: dict[str, Tensor]
    counts: dict[tuple[str, str], Tensor]
    penalties: dict[str, float]
    measures: dict[str, float]
    stream: LayerStream | None


def gradient_of(settings: Recipe, layout: Layout) -> tuple[StepGradient, LayerStream | None]:
    """Return what makes the gradients of a run whose experts are trained to nothing in particular."""
    tokenizer = load_tokenizer(settings.base.model)
    tasks = prepare(settings.data, tokenizer, 0)
    config = MixtureConfig.from_recipe(settings.adapter, 2)
    base = load_base(settings.base)
    stream = prepare_base(base, layout, CPU)
    model = add_adapter(base, config, 0)
    objective = objective_of(settings.objective)
    if objective.has_head:
        add_head(model, 0)
    model.train()
    for name, tensor in model.named_parameters():
        if "mixture_B" in name:
            torch.nn.init.normal_(tensor, std=0.1, generator=torch.Generator().manual_seed(sum(map(ord, name))))
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    updater = PlainUpdater(trained, torch.optim.SGD(trained.values(), lr=0.0))
    batches = MicroBatches(
        model,
        updater,
        Processes(0, 1, CPU),
        Progress(),
        print,
        layout.micro_batch,
        0,
        tokenizer.pad_token_id,
        64,
        objective,
        rows_by_layer=layout.rows_by_layer,
    )
    capacity = settings.data.max_length if settings.data.packing else None
    course = Course(TaskMix(settings.data, tasks, 0), tasks, ROWS, 4, capacity)
    opening = Opening(model, updater, batches.progress, None, Parts(), 4)
    return StepGradient(batches, course, config, None, LearnedRouting(), opening), stream


def step_of(settings: Recipe, layout: Layout, steps: int = 2) -> Found:
    """Return what the last of some steps came to: the first leaves slots and buffers in use."""
    gradient, stream = gradient_of(settings, layout)
    batches = gradient.batches
    for step in range(steps):
        batches.progress.step = step
        batches.updater.forget_gradients()
        if batches.routing is not None:
            batches.routing.forget()
        loss = gradient.accumulate(gradient.course.rows(step), lambda: None)
    found = {name: copy.deepcopy(tensor.grad) for name, tensor in batches.updater.parameters.items()}
    assert batches.routing is not None
    return Found(
        loss,
        {name: tensor for name, tensor in found.items() if tensor is not None},
        dict(batches.routing.counts),
        batches.routing.take_values(),
        gradient.measures(),
        stream,
    )


def refuse_other(found: Found, wanted: Found) -> None:
    assert torch.equal(found.loss, wanted.loss)
    assert found.gradients.keys() == wanted.gradients.keys()
    assert wanted.gradients
    for name, tensor in wanted.gradients.items():
        assert torch.equal(found.gradients[name], tensor), name
    assert found.counts.keys() == wanted.counts.keys()
    assert all(torch.equal(found.counts[key], count) for key, count in wanted.counts.items())
    assert found.penalties == pytest.approx(wanted.penalties, rel=1e-6)
    assert found.measures == pytest.approx(wanted.measures, rel=1e-6)


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of five layers, so that streamed ones have to be fetched, and tasks whose rows have vectors and spans."""
    folder = tmp_path_factory.mktemp("longer")
    tiny.save_base(folder / "base", layers=5)
    tiny.save_tasks(folder / "data")
    return folder


CASES = {
    "d2mora": ("d2mora",),
    "dropout": ("d2mora", "adapter.dropout=0.3"),
    "a mask for each expert": ("d2mora", "adapter.dropout=0.3", "adapter.dropout_per_expert=true"),
    "packed": ("d2mora", "data.packing=true", "adapter.dropout=0.3"),
}


@pytest.mark.parametrize("case", list(CASES))
def test_turns_in_each_layer_change_no_bit_of_a_step(case: str, longer: Path, tmp_path: Path) -> None:
    method, *overrides = CASES[case]
    settings = recipe(longer, tmp_path / "run", *overrides, method=method)
    wanted = step_of(settings, PLAIN)
    refuse_other(step_of(settings, AWAY), wanted)


ROUTED = {
    # Penalties of single routers, pooled in a layer, pooled in the model, and by row; loads that biases move by; routers
    # that a block shares; tasks; whole MLPs.
    name: (name, *more)
    for name, *more in (
        ("mixlora",),
        ("flylora", "adapter.gates={rank: {top_k: 2}}"),
        ("lora_mixer",),
        ("llava_mole",),
        ("hydralora",),
        ("moelora",),
        ("mola", "adapter.allocation=2-4"),
        ("noisy_top_k", "adapter.targets=[mlp]"),
    )
}


@pytest.mark.parametrize("case", list(ROUTED))
def test_what_routers_leave_of_a_micro_batch_is_its_own(case: str, longer: Path, tmp_path: Path) -> None:
    method, *overrides = ROUTED[case]
    settings = recipe(longer, tmp_path / "run", "adapter.dropout=0.1", *overrides, method=method)
    refuse_other(step_of(settings, AWAY), step_of(settings, PLAIN))


def test_each_layer_is_fetched_once_in_either_direction_for_all_micro_batches(longer: Path, tmp_path: Path) -> None:
    settings = recipe(longer, tmp_path / "run")
    forward, backward = [0, 1, 2, 3, 4], [2, 1, 0]  # those in the two slots where the pass turns are there
    for rows, groups in ((ROWS, 1), (ROWS // 2, 2), (0, 4)):
        stream = step_of(settings, replace(AWAY, rows_by_layer=rows), steps=1).stream
        assert stream is not None
        again = [*forward[2:], *backward]  # the last pass left the first layers
        assert stream.copied == [*forward, *backward, *again * (groups - 1)], rows
