"""The ledger against exact arithmetic at 7B and against the bytes of real tensors."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import tiny
import torch
from live_bytes import peak_bytes
from planned import CPU, PAPER, QKV, adapted, recipe_of, shapes_of
from torch import Tensor, nn

from qd2mora.base import SHAPES, is_nf4, load_base
from qd2mora.errors import InputRefused
from qd2mora.memory.ledger import weight_bytes
from qd2mora.memory.sizes import dequantised_bytes, nf4_bytes, penalty_bytes, trainable_bytes
from qd2mora.mixture import orthogonality, penalty_terms
from qd2mora.recipe.optimizers import OPTIMIZERS

GIB, MIB = 1 << 30, 1 << 20
ALL = [*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL = {"method": "d2mora", "rank": 8, "down": {"experts": 3}, "up": {"experts": 8}}


@pytest.mark.parametrize(("double_quant", "gib"), [(True, 3.112), (False, 3.393)])
def test_4_bit_linears_of_a_7b_take_what_the_format_says(double_quant: bool, gib: float) -> None:
    recipe = recipe_of("random:llama2-7b", base={"double_quant": double_quant})
    items = weight_bytes(shapes_of(recipe), recipe, item=2)
    assert items["4-bit weights"] + items["quantisation state"] == pytest.approx(gib * GIB, rel=1e-3)
    assert items["embeddings"] == items["output head"] == 250 * MIB


def test_the_linears_of_every_named_shape_are_counted_whole() -> None:
    for name, millions in (("llama2-13b", 12_687.7696), ("llama2-70b", 68_451.04128), ("llama3-8b", 6_979.321856)):
        shapes = shapes_of(recipe_of(f"random:{name}"))
        assert sum(linear.entries for linear in shapes.linears) == round(millions * 1e6), name
    assert dequantised_bytes(shapes.largest_linear, False, 2) == 112 * MIB


@pytest.mark.parametrize(
    ("adapter", "parameters"),
    [
        ({**SMALL, "targets": QKV}, 35_788_800),
        (PAPER, 45_617_664),
        ({**SMALL, "targets": [*QKV, "up_proj", "down_proj"]}, 79_775_744),
        ({"method": "lora", "rank": 64, "targets": QKV}, 50_331_648),
        ({"method": "lora", "rank": 64, "targets": "all-linear"}, 159_907_840),
    ],
)
def test_trainable_parameters_of_a_7b_are_those_of_the_formula(adapter: dict[str, Any], parameters: int) -> None:
    assert sum(shapes_of(recipe_of("random:llama2-7b", adapter=adapter)).trainable) == parameters


def test_all_linear_is_every_linear_but_the_head() -> None:
    every, named = (shapes_of(recipe_of(adapter={**PAPER, "targets": targets})) for targets in ("all-linear", ALL))
    assert every == named


def test_a_target_that_matches_nothing_is_refused_by_name() -> None:
    with pytest.raises(InputRefused, match="'query' matches no linear; there are down_proj"):
        shapes_of(recipe_of(adapter={**PAPER, "targets": ["q_proj", "query"]}))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("model", ["random:tiny", "tied", "untied"])
def test_weight_items_are_the_bytes_of_the_real_tensors(
    model: str, double_quant: bool, quantization: str, tmp_path: Path
) -> None:
    if model != "random:tiny":
        model = str(tiny.save_base(tmp_path, tied=model == "tied"))
    recipe = recipe_of(model, base={"double_quant": double_quant, "quantization": quantization})
    base = load_base(recipe.base, CPU)
    state = [quant_state_bytes(module.weight) for module in base.modules() if is_nf4(module)]
    items = weight_bytes(shapes_of(recipe), recipe, item=4)
    assert items.get("quantisation state", 0) == sum(state)
    assert sum(items.values()) == sum(tensor.nbytes for tensor in base.parameters()) + sum(state)


def quant_state_bytes(weight: Any) -> int:
    state = weight.quant_state
    tensors = [state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return sum(tensor.nbytes for tensor in tensors)


def test_an_odd_weight_is_counted_to_the_byte() -> None:
    for double_quant in (True, False):
        weight = torch.randn(37, 129)  # 4,773 weights: 75 blocks, the last one short
        packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
        nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
        real = sum(tensor.nbytes for tensor in (state.absmax, state.code, *nested))
        assert nf4_bytes(weight.numel(), double_quant) == (packed.nbytes, real)


@pytest.mark.parametrize("method", ["d2mora", "hydralora", "lora", "moslora", "moelora"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_adapters_gradients_and_moments_are_those_of_a_real_step(method: str, optimizer: str) -> None:
    recipe = recipe_of(adapter={"method": method, "rank": 32, "targets": ALL}, train={"optimizer": optimizer})
    model = adapted(SHAPES["tiny"], recipe)
    parameters = [tensor for tensor in model.parameters() if tensor.requires_grad]
    for tensor in parameters:
        tensor.grad = torch.randn_like(tensor)
    moments = stepped(parameters, optimizer)
    items = trainable_bytes(shapes_of(recipe).trainable, optimizer)
    assert items["adapters"] == sum(tensor.nbytes for tensor in parameters)
    assert items["gradients"] == sum(tensor.grad.nbytes for tensor in parameters if tensor.grad is not None)
    assert items["optimizer state"] == moments


def stepped(parameters: list[nn.Parameter], optimizer: str) -> int:
    """Return the bytes of an optimiser's state after one step, each storage once."""
    kinds: dict[str, Any] = {"adamw": torch.optim.AdamW, "adamw_8bit": bnb.optim.AdamW8bit}
    stepper = kinds[optimizer](parameters, lr=1e-3)
    stepper.step()
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in stepper.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    }
    return sum(storages.values())


def test_8_bit_moments_are_about_two_bytes_a_parameter() -> None:
    trainable = shapes_of(recipe_of("random:llama2-7b")).trainable
    assert OPTIMIZERS["adamw_8bit"].state_bytes(trainable) == pytest.approx(2 * sum(trainable), rel=0.02)


@pytest.mark.parametrize("targets", [QKV, ALL])
def test_the_penalty_takes_no_more_than_planned(targets: list[str]) -> None:
    recipe = recipe_of(adapter={**PAPER, "targets": targets})
    model = adapted(SHAPES["tiny"], recipe)
    at_once = shapes_of(recipe).penalised

    def penalty() -> None:
        for _, value, banks in penalty_terms(model, "diversity_cos"):
            torch.autograd.grad(value, banks)

    measured, planned = peak_bytes(penalty), penalty_bytes(at_once, 1e-4)
    assert 0.8 * planned < measured < 1.05 * planned  # small tensors of cosines, which matter at this size alone
    with torch.no_grad():
        assert peak_bytes(lambda: orthogonality(model)) < 1.1 * penalty_bytes(at_once, 0)
