"""What the plan says of micro batches that take turns in each layer: their bytes, and the weights that are fetched."""

import pytest
import torch
from live_bytes import peak_bytes
from peft import PeftModel
from planned import CPU, PAPER, adapted, adapter_of, cpu_ledger, padded_batch, recipe_of
from test_activations import QKVUD, STATIC, WIDE, WORDY
from test_techniques import FIVE
from torch import Tensor

from qd2mora.base import Shape, random_base
from qd2mora.memory.by_layer import LayerByLayer
from qd2mora.memory.ledger import fetched_bytes, ledger
from qd2mora.memory.loss import RowLoss
from qd2mora.memory.plan import plan
from qd2mora.memory.shapes import read_shapes
from qd2mora.memory.techniques import Layout, prepare_base
from qd2mora.mixture import add_adapter
from qd2mora.recipe import Base, Recipe


def run_in_turn(model: PeftModel, batches: list[dict[str, Tensor]]) -> None:
    loss, layers = RowLoss(model), LayerByLayer(model)
    for batch in batches:
        layers.read(batch)
    layers.forward()
    for number, batch in enumerate(batches):
        with layers.last_states_of(number):
            loss(batch).sum().backward()
    layers.backward()


@pytest.mark.parametrize(
    ("shape", "in_turn", "dtype", "length"),
    [
        # Rows so short that what the decoder makes anew for each loss shows.
        (WIDE, 6, "float32", 128),
        pytest.param(WIDE, 2, "float32", 128, marks=pytest.mark.long),
        pytest.param(WIDE, 4, "float32", 256, marks=pytest.mark.long),
        pytest.param(WORDY, 4, "float32", 256, marks=pytest.mark.long),
        pytest.param(WIDE, 8, "float32", 256, marks=pytest.mark.long),
        pytest.param(WIDE, 3, "bfloat16", 256, marks=pytest.mark.long),
    ],
)
def test_the_planned_peak_of_micro_batches_in_turn_is_the_measured_one(
    shape: Shape, in_turn: int, dtype: str, length: int
) -> None:
    recipe = recipe_of(max_length=length, adapter={**PAPER, "targets": QKVUD, "penalty": 0.0})
    model = adapted(shape, recipe, dtype, recomputed=True)
    for tensor in model.parameters():
        tensor.grad = torch.zeros_like(tensor) if tensor.requires_grad else None
    batches = [padded_batch(2, length, shape.vocab) for _ in range(in_turn)]
    measured = peak_bytes(lambda: run_in_turn(model, batches))
    written = cpu_ledger(shape, recipe, 2, True, getattr(torch, dtype), rows_by_layer=2 * in_turn)
    planned = sum(size for name, size in written.items.items() if name not in STATIC)
    assert measured <= planned <= 1.06 * measured


@pytest.mark.long
def test_what_waits_on_the_host_is_planned_there_and_what_stays_on_the_device() -> None:
    recipe = recipe_of(max_length=256, adapter={**PAPER, "targets": QKVUD, "penalty": 0.0})
    setting = Layout(2, 4, torch.float32, False, offload_activations=True, rows_by_layer=8)
    base = random_base(WIDE, Base(model="random:tiny", compute_dtype="float32"), CPU)
    prepare_base(base, setting, CPU)
    model = add_adapter(base, adapter_of(recipe), seed=0)
    model.train()
    for tensor in model.parameters():
        tensor.grad = torch.zeros_like(tensor) if tensor.requires_grad else None
    batches = [padded_batch(2, 256, WIDE.vocab) for _ in range(4)]
    measured = peak_bytes(lambda: run_in_turn(model, batches))
    written = ledger(read_shapes(WIDE.config(), adapter_of(recipe)), recipe, setting)
    planned = sum(size for name, size in written.items.items() if name not in STATIC)
    assert measured <= planned <= 1.06 * measured
    one = 2 * 256 * 256 * 4
    assert written.items["layer inputs (host)"] == 4 * 4 * one
    assert written.items["states that wait their turn"] == (4 + 1) * one


def test_weights_fetched_in_a_step_are_those_that_are_copied() -> None:
    recipe = recipe_of(max_length=48, adapter={**PAPER, "rank": 4}, train={"global_batch": 8})
    shapes = read_shapes(FIVE.config(), adapter_of(recipe))
    for in_turn, passes in ((1, 4), (2, 2), (4, 1)):
        setting = Layout(2, 5, torch.float32, False, stream=True, rows_by_layer=2 * in_turn if in_turn > 1 else 0)
        base = random_base(FIVE, Base(model="random:tiny", compute_dtype="float32"), CPU)
        stream = prepare_base(base, setting, CPU)
        assert stream is not None
        model = add_adapter(base, adapter_of(recipe), seed=0)
        model.train()
        batches = [padded_batch(2, 48, FIVE.vocab) for _ in range(in_turn)]
        run_in_turn(model, batches)  # the first step fetches the first layers too
        stream.copied.clear()
        for _ in range(passes):
            run_in_turn(model, batches)
        copied = sum(stream.hosts[index].nbytes for index in stream.copied)
        assert fetched_bytes(shapes, recipe, setting) == copied, in_turn


def paper(max_length: int, **memory: object) -> Recipe:
    return recipe_of("random:llama2-7b", max_length, train={"global_batch": 16}, memory=memory)


def test_turns_are_taken_where_copies_would_be_waited_for_and_the_plan_says_what_they_save() -> None:
    taken, left = (plan(paper(256, accumulation=how), "2GiB") for how in ("auto", "micro_batch"))
    assert taken.fits and left.fits
    assert taken.layout.stream and taken.layout.at_once > 1 and left.layout.rows_by_layer == 0
    choice = taken.choices["memory.accumulation"]
    assert choice.value == "layer"
    assert "4 micro batches take turns in each layer, which is fetched once for all" in choice.reason
    assert "23.34 GiB of weights are fetched in a step, 93.34 one after the other" in choice.reason
    assert "93.34 GiB of weights are fetched in a step" in left.choices["memory.accumulation"].reason


def test_where_no_layer_is_fetched_none_take_turns() -> None:
    planned = plan(paper(256), "24GiB")
    assert not planned.layout.stream and planned.layout.rows_by_layer == 0
    assert plan(paper(256, offload={"weights": "none"}), "24GiB").choices["memory.accumulation"].reason == (
        "layers that are there need not be fetched"
    )


def test_turns_that_are_asked_for_are_taken_of_resident_layers_too_and_recompute_them_all() -> None:
    planned = plan(paper(256, accumulation="layer", offload={"weights": "none"}), "24GiB")
    assert planned.layout.rows_by_layer == 16 and planned.layout.recomputed == 32 and not planned.layout.stream
