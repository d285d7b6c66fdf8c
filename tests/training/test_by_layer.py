"""Micro batches that take turns in each layer: the same losses and gradients to the bit, and one fetch for all."""

import copy
import re
from dataclasses import dataclass, replace
from pathlib import Path

import judged_runs as runs
import pytest
import tiny
import torch
from interrupted import stop_after, train_in_two
from test_training import recipe
from torch import Tensor

from qd2mora.base import load_base, load_tokenizer
from qd2mora.data import TaskMix, prepare
from qd2mora.errors import InputRefused, SignalStop
from qd2mora.memory.by_layer import LayerByLayer
from qd2mora.memory.plan import plan
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


PLAINER = ("d2mora", "dropout", "packed")
CASES = {
    "d2mora": ("d2mora",),
    "dropout": ("d2mora", "adapter.dropout=0.3"),
    "a mask for each expert": ("d2mora", "adapter.dropout=0.3", "adapter.dropout_per_expert=true"),
    "packed": ("d2mora", "data.packing=true", "adapter.dropout=0.3"),
}


LONG = pytest.mark.long


@pytest.mark.parametrize("case", ["a mask for each expert", *(pytest.param(n, marks=LONG) for n in PLAINER)])
def test_turns_in_each_layer_change_no_bit_of_a_step(case: str, longer: Path, tmp_path: Path) -> None:
    method, *overrides = CASES[case]
    settings = recipe(longer, tmp_path / "run", *overrides, method=method)
    wanted = step_of(settings, PLAIN)
    refuse_other(step_of(settings, AWAY), wanted)


ROUTED = {
    # Penalties of single routers, pooled in a layer, pooled in the model, and by row; loads that biases move by;
    # routers that a block shares; tasks; whole MLPs.
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


@pytest.mark.parametrize("case", ["mola", *(pytest.param(name, marks=LONG) for name in ROUTED if name != "mola")])
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


LAYER, ALONE = "memory.accumulation=layer", "memory.accumulation=micro_batch"
STREAMED = ("memory.offload.weights=stream", "memory.checkpointing=on", "memory.offload.activations=cpu")
FEW = ("data.tasks.0.validation=2", "data.tasks.1.validation=2", "train.steps=4", "train.save_every=9")
SPLIT = (*STREAMED, *FEW, "train.micro_batch=1", "adapter.dropout=0.2", "memory.rehearsal=off")


@pytest.fixture(scope="module")
def alone(longer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    train(recipe(longer, run, *SPLIT, ALONE))
    return run


def test_a_run_that_is_broken_off_and_resumed_is_that_of_micro_batches_one_after_the_other(
    alone: Path, longer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_in_two(recipe(longer, tmp_path / "run", *SPLIT, LAYER), 2, monkeypatch)
    assert runs.bytes_of(tmp_path / "run") == runs.bytes_of(alone)
    ours, theirs = (runs.lines_of(run) for run in (tmp_path / "run", alone))
    assert [line["loss"] for line in ours if "loss" in line] == [line["loss"] for line in theirs if "loss" in line]
    said = "memory.accumulation: layer (as the recipe says; 0.00 GiB of weights are fetched in a step, 0.00 one after"
    assert said in capsys.readouterr().out.replace("\n", " ")


@LONG
def test_a_run_may_be_resumed_with_the_other_order(
    alone: Path, longer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SignalStop), monkeypatch.context() as patched:
        stop_after(2, patched)
        train(recipe(longer, tmp_path / "run", *SPLIT, LAYER))
    train(recipe(longer, tmp_path / "run", *SPLIT, ALONE), resume=True)
    assert runs.bytes_of(tmp_path / "run") == runs.bytes_of(alone)


@LONG
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_ran_out_of_memory_is_done_again_with_fewer_micro_batches_at_a_time(
    where: str,
    alone: Path,
    longer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, numbers = getattr(LayerByLayer, where), []

    def faulty(self: LayerByLayer) -> None:
        numbers.append(len(self._micro_batches))
        whole(self)
        if len(numbers) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LayerByLayer, where, faulty)
    train_in_two(recipe(longer, tmp_path / "run", *SPLIT, LAYER), 2, monkeypatch)
    assert numbers == [4, 4, *[2] * 6]  # the resumed part has the fewer too
    assert "out of memory: from step 2 on 2 micro batches of 1 at a time in each layer" in capsys.readouterr().out
    assert runs.bytes_of(tmp_path / "run") == runs.bytes_of(alone)


@LONG
def test_the_rehearsal_runs_as_many_as_take_turns_and_leaves_nothing(
    alone: Path, longer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, numbers = LayerByLayer.forward, []

    def counting(self: LayerByLayer) -> None:
        numbers.append(len(self._micro_batches))
        read(self)

    monkeypatch.setattr(LayerByLayer, "forward", counting)
    train(recipe(longer, tmp_path / "run", *SPLIT, LAYER, "memory.rehearsal=on"))
    assert numbers == [4] * 5
    assert runs.bytes_of(tmp_path / "run") == runs.bytes_of(alone)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    tiny.save_base(folder / "base", layers=3)
    runs.save_rows(folder / "data")
    return folder


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=LONG) for kind in ("dpo", "orpo", "simpo", "reward", "kto", "peam")]
)
def test_every_objective_learns_the_same(
    kind: str, judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QD2MORA_CACHE", str(tmp_path / "cache"))
    for name in (LAYER, ALONE):
        train(runs.recipe_of(judged, tmp_path / name, kind, *STREAMED, "train.micro_batch=1", "train.steps=3", name))
    assert runs.bytes_of(tmp_path / LAYER) == runs.bytes_of(tmp_path / ALONE)
    ours, theirs = (runs.lines_of(tmp_path / name) for name in (LAYER, ALONE))
    for one, other in zip(ours, theirs, strict=True):
        for told in one.keys() - {"tokens_per_s", "step_s", "memory"}:
            assert one[told] == other[told], told


@pytest.mark.parametrize(
    ("method", "change", "why"),
    [
        ("d2mora", "memory.checkpointing=off", "every layer is recomputed by it, and memory.checkpointing is off"),
        ("d2mora", "memory.checkpointing=1", "every layer is recomputed by it, and memory.checkpointing is 1"),
        ("remix", "train.seed=1", "a router that samples runs a micro batch several times"),
        ("base_gate", "adapter.penalties={base_or_expert: 1.0}", "penalty base_or_expert runs a micro batch several"),
        ("lora_mixer", "adapter.gates={down: {input: hidden}}", "a router reads a first pass over each micro batch"),
        ("dora", "adapter.targets=[q_proj]", "dropout of method dora is drawn in the order of layers"),
    ],
)
def test_what_cannot_take_turns_is_refused_where_it_is_asked_for_and_told_where_not(
    method: str, change: str, why: str, longer: Path, tmp_path: Path
) -> None:
    settings = ["train.micro_batch=1", change]
    gated = ("adapter.down={experts: 1}", "adapter.up={experts: 1}") if method == "base_gate" else ()
    with pytest.raises(InputRefused, match=re.escape(f"memory.accumulation: layer will not do: {why}")):
        plan(recipe(longer, tmp_path / "run", *settings, *gated, LAYER, method=method))
    if method == "dora":
        return  # is never streamed, so that nothing is fetched
    planned = plan(recipe(longer, tmp_path / "run", *settings, *gated, "memory.offload.weights=stream", method=method))
    assert planned.layout.rows_by_layer == 0
    assert planned.choices["memory.accumulation"].reason.startswith(why)


@pytest.mark.parametrize("changes", [("objective.reference=live",), ("objective.kl=0.1",)])
def test_an_objective_that_asks_a_second_model_takes_no_turns(
    changes: tuple[str], judged: Path, tmp_path: Path
) -> None:
    kind = "grpo" if "kl" in changes[0] else "dpo"
    settings = runs.recipe_of(judged, tmp_path / "run", kind, *changes, "train.micro_batch=1", LAYER)
    with pytest.raises(InputRefused, match=f"objective: {kind} asks a second model in the midst of a micro batch"):
        plan(settings)
