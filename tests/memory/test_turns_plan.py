"""Micro batches that take turns in each layer take the bytes that the ledger says; where they do, and what is said."""

import pytest
import torch
from live_bytes import peak_bytes
from planned import CPU, PAPER, adapted, cpu_ledger, padded_batch, recipe_of
from test_activations import QKVUD, STATIC, WIDE

from qd2mora.memory.by_layer import LayerByLayer
from qd2mora.memory.checkpointing import recompute_layers
from qd2mora.memory.loss import RowLoss
from qd2mora.memory.plan import plan

LENGTH, ROWS = 128, 2


@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize("number", [2, 6])
def test_the_planned_peak_of_micro_batches_that_take_turns_is_the_measured_one(number: int, offloads: bool) -> None:
    recipe = recipe_of(max_length=LENGTH, adapter={**PAPER, "targets": QKVUD, "penalty": 0.0})
    model = adapted(WIDE, recipe, recomputed=True)
    recompute_layers(model.get_base_model(), WIDE.layers, offloads, CPU)
    for tensor in model.parameters():
        tensor.grad = torch.zeros_like(tensor) if tensor.requires_grad else None
    batches = [padded_batch(ROWS, LENGTH, WIDE.vocab) for _ in range(number)]
    loss = RowLoss(model)

    def step() -> None:
        layers = LayerByLayer(model)
        for batch in batches:
            layers.read(batch)
        layers.forward()
        for place, batch in enumerate(batches):
            with layers.last_states_of(place):
                loss(batch).sum().backward()
        layers.backward()

    measured = peak_bytes(step)
    written = cpu_ledger(
        WIDE, recipe, ROWS, True, torch.float32, rows_by_layer=number * ROWS, offload_activations=offloads
    )
    planned = sum(size for name, size in written.items.items() if name not in STATIC)
    assert measured <= planned * 1.005
    assert planned == pytest.approx(measured, rel=0.02)


SMALL = {"micro_batch": 1, "global_batch": 16, "optimizer": "adamw_8bit"}


def test_on_a_small_card_they_take_turns_and_what_is_fetched_is_told() -> None:
    planned = plan(recipe_of("random:llama-7b", 512, train=SMALL), "2GiB")
    layout, choice = planned.layout, planned.choices["memory.accumulation"]
    assert planned.fits and (layout.at_once, layout.stream, layout.recomputed) == (16, True, 32)
    assert choice.value == "layer" and "GiB of weights are fetched in a step" in choice.reason
    assert planned.host["layer inputs (host)"] == 16 * 32 * 512 * 4096 * 2
    alone = plan(recipe_of("random:llama-7b", 512, train=SMALL, memory={"accumulation": "micro_batch"}), "2GiB")
    assert alone.layout.at_once == 1


def test_on_a_large_card_they_have_no_reason_to() -> None:
    planned = plan(recipe_of("random:llama-7b", 512, train=SMALL), "24GiB", torch.device("cuda"))
    assert planned.layout.at_once == 1 and planned.choices["memory.accumulation"].value == "micro_batch"
