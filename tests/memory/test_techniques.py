"""What saves memory changes no bit of loss and gradients, and takes the bytes that the ledger says."""

import weakref
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes, peak_bytes
from peft import PeftModel
from planned import CPU, PAPER, QKV, adapted, adapter_of, cpu_ledger, padded_batch, recipe_of
from test_activations import QKVUD, STATIC, WIDE, WORDY, every_item, saved_bytes
from torch import Tensor
from transformers import PreTrainedModel

from qd2mora.base import Shape, random_base
from qd2mora.memory.checkpointing import Boundaries, decoder_layers, recompute_layers
from qd2mora.memory.ledger import ledger
from qd2mora.memory.loss import RowLoss, labelled_states
from qd2mora.memory.plan import plan
from qd2mora.memory.shapes import read_shapes
from qd2mora.memory.sizes import CODE_BOOK, NESTED_TABLES
from qd2mora.memory.streaming import LayerStream, frozen_tensors, streamed_layers
from qd2mora.memory.techniques import Layout, prepare_base
from qd2mora.mixture import add_adapter
from qd2mora.recipe import Base

FIVE = Shape(64, 172, 5, 4, 2, vocab=300)
PLAIN = Layout(2, 0, torch.float32, on_gpu=False)
ALL_AT_ONCE = replace(PLAIN, recomputed=5, offload_activations=True, offload_embeddings=True, stream=True)


def prepared(setting: Layout, **base: Any) -> tuple[PeftModel, LayerStream | None]:
    """Return an adapted model with up experts that are not zero, and its stream."""
    recipe = recipe_of(max_length=48, adapter={**PAPER, "rank": 4, "targets": "all-linear"})
    model = random_base(FIVE, Base(model="random:tiny", compute_dtype="float32", **base), CPU)
    stream = prepare_base(model, setting, CPU)
    model = add_adapter(model, adapter_of(recipe), seed=0)
    model.train()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.named_parameters():
        if ".mixture_B." in name:
            torch.nn.init.normal_(tensor, std=0.05, generator=generator)
    return model, stream


def losses_and_gradients(model: PeftModel) -> list[Tensor]:
    """Return the rows' losses and all gradients of a second step: the first leaves slots and buffers in use."""
    batch = padded_batch(2, 48, FIVE.vocab)
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    for _ in range(2):
        losses = RowLoss(model)(batch)
        gradients = torch.autograd.grad(losses.sum(), trained)
    return [losses, *gradients]


@cache
def plain_result(**base: Any) -> list[Tensor]:
    return losses_and_gradients(prepared(PLAIN, **base)[0])


@pytest.mark.parametrize(
    "setting",
    [
        replace(PLAIN, recomputed=5),
        replace(PLAIN, recomputed=2),
        replace(PLAIN, recomputed=5, offload_activations=True),
        replace(PLAIN, recomputed=3, offload_activations=True),
        replace(PLAIN, offload_embeddings=True),
        replace(PLAIN, stream=True),
        replace(PLAIN, recomputed=2, stream=True),
        replace(PLAIN, stream=True, resident=2),
        replace(ALL_AT_ONCE, resident=3),
        ALL_AT_ONCE,
    ],
)
def test_no_technique_changes_a_bit_of_loss_and_gradients(setting: Layout) -> None:
    results = losses_and_gradients(prepared(setting)[0])
    assert all(map(torch.equal, results, plain_result()))


@pytest.mark.parametrize("base", [{"double_quant": False}, {"quantization": "none"}])
def test_streaming_takes_every_kind_of_base(base: dict[str, Any]) -> None:
    results = losses_and_gradients(prepared(ALL_AT_ONCE, **base)[0])
    assert all(map(torch.equal, results, plain_result(**base)))


@pytest.mark.parametrize("num_slots", [2, 3])
def test_layers_are_copied_one_ahead_in_both_directions_and_no_more_often_than_needed(num_slots: int) -> None:
    model = random_base(FIVE, Base(model="random:tiny", compute_dtype="float32"), CPU)
    stream = LayerStream(list(decoder_layers(model)), CPU, num_slots)
    recompute_layers(model, 5, False, CPU)
    model = add_adapter(model, adapter_of(recipe_of()), seed=0)
    model.train()
    for _ in range(2):
        RowLoss(model)(padded_batch(2, 48, FIVE.vocab)).sum().backward()
    forward, backward = list(range(5)), list(range(4 - num_slots, -1, -1))
    left = list(range(num_slots))  # the backward pass ends with the first layers in their slots
    assert stream.copied == [*forward, *backward, *forward[len(left) :], *backward]


def test_what_the_embedding_makes_does_not_stay_where_layer_inputs_leave() -> None:
    model, _ = prepared(replace(PLAIN, recomputed=5, offload_activations=True))
    made: list[weakref.ref[Tensor]] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: made.append(weakref.ref(output)))
    losses = RowLoss(model)(padded_batch(2, 48, FIVE.vocab))
    assert made[0]() is None  # it would be a leaf that waits for a gradient nobody reads
    losses.sum().backward()


def test_an_evaluation_in_between_and_a_broken_pass_do_no_harm() -> None:
    model, _ = prepared(ALL_AT_ONCE)
    batch = padded_batch(2, 48, FIVE.vocab)
    RowLoss(model)(batch)  # a forward pass whose backward never comes
    model.eval()
    with torch.no_grad():
        evaluated = RowLoss(model)(batch)
    model.train()
    plain, *_ = plain_result()
    assert torch.equal(evaluated, plain.detach())
    assert all(map(torch.equal, losses_and_gradients(model), plain_result()))


@pytest.mark.parametrize(("layers", "resident"), [(5, 0), (5, 1), (5, 3), (32, 28), (48, 20)])
def test_resident_layers_are_spread_among_the_streamed(layers: int, resident: int) -> None:
    streamed = streamed_layers(layers, resident)
    assert len(streamed) == layers - resident
    staying = sorted(set(range(layers)) - set(streamed))
    gaps = [after - before for before, after in pairwise([-1, *staying, layers])]
    assert not staying or max(gaps) <= layers // resident + 1


def test_resident_layers_are_planned_where_they_lie() -> None:
    recipe, resident = recipe_of(adapter={**PAPER, "rank": 4}), 2
    model = random_base(FIVE, Base(model="random:tiny", compute_dtype="float32"), CPU)
    stream = prepare_base(model, replace(PLAIN, stream=True, resident=resident), CPU)
    assert stream is not None
    written = cpu_ledger(FIVE, recipe, 1, 5, torch.float32, stream=True, resident=resident).items
    assert sum(host.nbytes for host in stream.hosts) == written["streamed layers (host)"]
    slots = {slot.untyped_storage().data_ptr() for slot in stream.slots}
    tensors = [tensor for layer in decoder_layers(model) for *_, tensor in frozen_tensors(layer)]
    staying = sum(each.nbytes for each in tensors if each.untyped_storage().data_ptr() not in slots)
    tables = CODE_BOOK + NESTED_TABLES  # of every linear: they stay whether it is streamed or not
    linears = sum(isinstance(part, torch.nn.Linear) for layer in decoder_layers(model) for part in layer.modules())
    assert staying == written["4-bit weights"] + written["quantisation state"] - linears * tables


def test_room_that_is_left_goes_to_layers_and_no_plan_is_above_its_budget() -> None:
    recipe = recipe_of("random:llama2-7b", 256, train={"global_batch": 1})  # copies are what is waited for
    budgets = [size << 20 for size in (2500, 3000, 3500, 4000, 4500)]
    plans = [plan(recipe, budget) for budget in budgets]
    assert all(planned.fits for planned in plans)
    resident = [planned.layout.resident for planned in plans if planned.layout.stream]
    assert len(resident) >= 3
    assert resident == sorted(resident)
    assert resident[0] < resident[-1] <= 30


def test_streamed_weights_leave_only_their_slots_on_the_device() -> None:
    model = random_base(FIVE, Base(model="random:tiny", compute_dtype="float32"), CPU)
    before = [sum(tensor.nbytes for *_, tensor in frozen_tensors(layer)) for layer in decoder_layers(model)]
    stream = LayerStream(list(decoder_layers(model)), CPU)
    there = {
        tensor.untyped_storage().data_ptr() for layer in decoder_layers(model) for *_, tensor in frozen_tensors(layer)
    }
    assert there == {slot.untyped_storage().data_ptr() for slot in stream.slots}
    recipe = recipe_of(adapter={**PAPER, "rank": 4})
    written = cpu_ledger(FIVE, recipe, 1, 5, torch.float32, stream=True).items
    assert sum(slot.nbytes for slot in stream.slots) == written["slots of streamed layers"] >= 2 * max(before)
    assert sum(host.nbytes for host in stream.hosts) == written["streamed layers (host)"] >= sum(before)


def test_layer_inputs_that_left_are_gone_from_the_graph_and_their_buffers_serve_again() -> None:
    store = Boundaries(CPU)
    x = torch.randn(3, 5, requires_grad=True)
    for _ in range(3):
        store.forget()
        with torch.autograd.graph.saved_tensors_hooks(store.leave, store.come_back):
            y = (x * 2).exp()  # exp keeps its output
            z = y.sin()  # sin keeps its input
        z.sum().backward()
    assert store.most_away == 2
    assert sum(map(len, store._free.values())) == 0
    store.forget()
    assert sum(map(len, store._free.values())) == 2


def measured_step(recipe: Any, shape: Shape, rows: int, dtype: str, recomputed: int) -> int:
    model = adapted(shape, recipe, dtype, recomputed)
    for tensor in model.parameters():
        tensor.grad = torch.zeros_like(tensor) if tensor.requires_grad else None
    batch = padded_batch(rows, recipe.data.max_length, shape.vocab)
    return peak_bytes(lambda: RowLoss(model)(batch).sum().backward())


@pytest.mark.parametrize(
    ("recomputed", "dtype"),
    [
        *((number, "float32") for number in (1, 2, 3)),
        (2, "bfloat16"),
        # 16-bit products are slow on a CPU.
        *(pytest.param(number, "bfloat16", marks=pytest.mark.long) for number in (1, 3)),
    ],
)
def test_the_planned_peak_with_some_layers_recomputed_is_the_measured_one(recomputed: int, dtype: str) -> None:
    recipe = recipe_of(max_length=256, adapter={**PAPER, "targets": QKVUD, "penalty": 0.0})
    measured = measured_step(recipe, WIDE, 4, dtype, recomputed)
    written = cpu_ledger(WIDE, recipe, 4, recomputed, getattr(torch, dtype))
    planned = sum(size for name, size in written.items.items() if name not in STATIC)
    assert planned == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(("shape", "rows", "chunk"), [(WORDY, 5, 256), (WORDY, 4, 100), (WIDE, 4, 128)])
def test_the_planned_peak_with_smaller_chunks_of_the_loss_is_the_measured_one(
    shape: Shape, rows: int, chunk: int
) -> None:
    recipe = recipe_of(max_length=256, adapter={**PAPER, "targets": QKV, "penalty": 0.0})
    model = adapted(shape, recipe, recomputed=True)
    for tensor in model.parameters():
        tensor.grad = torch.zeros_like(tensor) if tensor.requires_grad else None
    batch = padded_batch(rows, 256, shape.vocab)
    measured = peak_bytes(lambda: RowLoss(model, chunk)(batch).sum().backward())
    written = cpu_ledger(shape, recipe, rows, True, torch.float32, loss_chunk=chunk)
    planned = sum(size for name, size in written.items.items() if name not in STATIC)
    assert planned == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "rows"), [(WIDE, 4), (WORDY, 4)])
def test_the_planned_evaluation_is_the_measured_one(shape: Shape, rows: int, dtype: str) -> None:
    recipe = recipe_of(max_length=256, adapter={**PAPER, "targets": QKVUD})
    model = adapted(shape, recipe, dtype).eval()
    batch = padded_batch(rows, 256, shape.vocab)
    with torch.no_grad():
        measured = peak_bytes(lambda: RowLoss(model)(batch))
    planned = every_item(cpu_ledger(shape, recipe, rows, 0, getattr(torch, dtype)))["evaluation"]
    assert planned == pytest.approx(measured, rel=0.05)


def test_what_a_mixture_of_whole_mlps_keeps_is_counted_in_every_slot() -> None:
    # Of few ranks: what slots keep in rank space is not planned, 1% of the rest at a 7B's widths.
    recipe = recipe_of(
        max_length=96, adapter={"method": "mixlora", "rank": 2, "targets": ["gate_proj", "up_proj", "down_proj"]}
    )
    model = adapted(WIDE, recipe)
    batch = padded_batch(4, 96, WIDE.vocab)
    saved = saved_bytes(lambda: labelled_states(model, batch), model)
    shapes = read_shapes(WIDE.config(), adapter_of(recipe))
    assert shapes.layer.slots == 2
    planned = every_item(ledger(shapes, recipe, Layout(4, 0, torch.float32, False)))["activations"]
    assert planned == pytest.approx(saved, rel=0.05)


def test_layer_inputs_on_the_host_leave_two_of_them_on_the_device() -> None:
    recipe = recipe_of("random:llama2-7b", max_length=1024)
    shapes = read_shapes(FIVE.config(), adapter_of(recipe))
    here, away = (
        ledger(shapes, recipe, Layout(2, 5, torch.bfloat16, True, offload_activations=on)) for on in (False, True)
    )
    one = 2 * 1024 * 64 * 2
    assert every_item(here)["layer inputs"] - every_item(away)["layer inputs"] == 3 * one
    assert away.host["layer inputs (host)"] == 5 * one


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("setting", [ALL_AT_ONCE, replace(ALL_AT_ONCE, recomputed=2), replace(PLAIN, stream=True)])
def test_on_a_gpu_too_no_technique_changes_a_bit_and_slow_copies_are_waited_for(setting: Layout) -> None:
    device, results = torch.device("cuda"), []
    recipe = recipe_of(max_length=48, adapter={**PAPER, "rank": 4, "targets": "all-linear", "dropout": 0.0})
    for chosen in (PLAIN, setting):
        base: PreTrainedModel = random_base(FIVE, Base(model="random:tiny", compute_dtype="float32"), CPU)
        if not chosen.stream:
            base = base.to(device)
        stream = prepare_base(base, chosen, device)
        model = add_adapter(base, adapter_of(recipe), seed=0)
        model.train()
        if stream is not None and stream._stream is not None:
            with torch.cuda.stream(stream._stream):
                torch.cuda._sleep(50_000_000)  # every copy behind it comes late
        batch = {name: tensor.to(device) for name, tensor in padded_batch(2, 48, FIVE.vocab).items()}
        trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
        for _ in range(3):
            losses = RowLoss(model)(batch)
            gradients = torch.autograd.grad(losses.sum(), trained)
        results.append([losses, *gradients])
    assert all(map(torch.equal, *results))


def test_bytes_made_while_layers_stream_do_not_grow_with_the_number_of_layers() -> None:
    peaks = []
    for layers in (3, 6):
        model = random_base(replace(FIVE, layers=layers), Base(model="random:tiny", compute_dtype="float32"), CPU)
        LayerStream(list(decoder_layers(model)), CPU)
        with torch.no_grad(), LiveBytes() as live:
            model(padded_batch(2, 48, FIVE.vocab)["input_ids"], use_cache=False)
        peaks.append(live.peak)
    assert peaks[0] == peaks[1]
