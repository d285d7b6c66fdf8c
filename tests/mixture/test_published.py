"""Rows marked verified: each names the test that follows its public code, for its update and all else that it has."""

import importlib
import math
from collections.abc import Iterator

import made
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from qd2mora.mixture import MixtureConfig, add_adapter
from qd2mora.mixture.initialisers import initial_tensor
from qd2mora.mixture.presets import METHODS
from qd2mora.mixture.spec import Place, linear_spec

VERIFIED = [name for name, row in METHODS.items() if row.mark == "verified"]
FORMULA = "test_methods.test_a_row_of_the_table_equals_its_formula_in_output_and_gradients"
POOLED = "test_pooled_penalties.test_a_loss_over_all_routers_is_the_published_one_in_value_and_gradient"
BIASES = "test_routing.test_selection_biases_move_once_a_step_against_the_load_of_real_tokens_and_never_in_evaluation"
LOCALIZED = (
    "test_identities.test_localised_balance_is_the_plain_one_at_delta_zero_and_nothing_where_weighed_loads_are_equal"
)

# What of a row follows its public code in which test, in brackets the case that is the row's.
FOLLOWED: dict[str, dict[str, str]] = {
    name: {"update": f"{FORMULA}[{name}]"} for name in VERIFIED if name in made.NAMES
}
FOLLOWED["d2mora"] = {
    "update": "test_golden.test_output_and_gradients_equal_the_published_layer",
    "diversity_cos": "test_penalty.test_value_and_gradient_equal_the_double_loop",
}
FOLLOWED["lora"] = {"update": "test_published.test_lora_is_pefts_own_in_output_and_gradients"}
FOLLOWED["dora"] = {"update": "test_published.test_dora_is_its_formula_in_output_and_gradients"}
FOLLOWED["smora"]["bias_rate"] = f"{BIASES}[smora]"
FOLLOWED["flylora"]["bias_rate"] = f"{BIASES}[flylora]"
FOLLOWED["loramoe"]["localized_balance"] = LOCALIZED
FOLLOWED["mola"]["lb_mola"] = f"{POOLED}[mola]"
FOLLOWED["mixlora"] = {
    "update": "test_block.test_output_and_every_gradient_equal_the_loop_over_tokens_and_experts",
    "lb_mixtral": f"{POOLED}[mixlora]",
}
FOLLOWED["dynmole"] |= {"entropy": f"{POOLED}[dynmole]", "lb_soft": f"{POOLED}[dynmole]"}
FOLLOWED["llava_mole"]["lb_llava"] = f"{POOLED}[llava_mole]"
FOLLOWED["meteora"]["router_ce"] = f"{POOLED}[meteora]"


@pytest.mark.parametrize("name", VERIFIED)
def test_a_verified_row_names_the_test_that_follows_its_code_and_that_test_is_there(name: str) -> None:
    row = METHODS[name]
    parts = {"update", *(penalty.kind for penalty in row.penalties)}
    parts |= {"bias_rate" for gate in row.gates.values() if gate.bias_rate}
    assert "github" in row.source, "a row without public code is a reconstruction"
    assert set(FOLLOWED[name]) == parts
    for test in FOLLOWED[name].values():
        place, _, case = test.removesuffix("]").partition("[")
        module, _, function = place.partition(".")
        found = getattr(importlib.import_module(module), function)
        assert not case or case in cases_of(found), test


def test_no_other_row_is_said_to_be_followed() -> None:
    assert set(FOLLOWED) == set(VERIFIED)


def cases_of(test: object) -> Iterator[str]:
    """Yield the cases of a test's parametrisation."""
    for mark in getattr(test, "pytestmark", []):
        yield from (str(case) for case in mark.args[1])


def test_lora_is_pefts_own_in_output_and_gradients() -> None:
    layer, x = made.layer_of("lora"), made.input_for("lora").requires_grad_()
    A, B = (layer.tensors("default")[f"mixture_{bank}"] for bank in "AB")
    base = nn.Sequential(nn.Linear(made.D_IN, made.D_OUT)).double()
    base[0].load_state_dict(layer.base_layer.state_dict())
    peft = get_peft_model(base, LoraConfig(r=made.RANK, lora_alpha=made.ALPHA, target_modules=["0"]))
    theirs = {name.split(".")[-3]: tensor for name, tensor in peft.named_parameters() if tensor.requires_grad}
    for name, tensor in (("lora_A", A), ("lora_B", B)):
        theirs[name].data = tensor.detach()[0].clone()
    ours, wanted = layer(x), peft(x)
    torch.testing.assert_close(ours, wanted)
    mine = torch.autograd.grad(ours.square().sum(), [A, B, x])
    for one, other in zip(
        mine, torch.autograd.grad(wanted.square().sum(), [theirs["lora_A"], theirs["lora_B"], x]), strict=True
    ):
        torch.testing.assert_close(one.view_as(other), other)


@pytest.mark.parametrize("targets", [["q_proj"], "q_pro."], ids=["a list", "a pattern"])
def test_dora_is_its_formula_in_output_and_gradients(targets: list[str] | str) -> None:
    """The norm has no gradient, as in section 4.3 of the paper and in PEFT; beside the targets a magnitude alone."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"q_proj": nn.Linear(5, 3), "o_proj": nn.Linear(3, 4), "other": nn.Linear(2, 2)}).double()
    weights = {name: (linear.weight.detach().clone(), linear.bias.detach()) for name, linear in base.items()}
    config = MixtureConfig(method="dora", rank=2, alpha=3.0, target_modules=targets)
    adapted = add_adapter(base, config, 0).double()
    model = adapted.base_model.model
    own = {name: tensor for name, tensor in adapted.named_parameters() if tensor.requires_grad}
    own = {".".join(name.split(".")[2:4]): tensor for name, tensor in own.items() if "lora" in name}
    assert set(own) == {
        "q_proj.lora_A",
        "q_proj.lora_B",
        "q_proj.lora_magnitude_vector",
        "o_proj.lora_magnitude_vector",
    }
    own["q_proj.lora_B"].data.normal_()
    x = torch.randn(4, 5, dtype=torch.float64)
    own["o_proj.lora_magnitude_vector"].data.mul_(1.5)
    m, A, B, alone = (
        own[name].detach().clone().requires_grad_()
        for name in ("q_proj.lora_magnitude_vector", "q_proj.lora_A", "q_proj.lora_B", "o_proj.lora_magnitude_vector")
    )
    (W, bias), (W_o, bias_o) = weights["q_proj"], weights["o_proj"]
    torch.testing.assert_close(m.detach(), W.norm(dim=1))
    V = W + 1.5 * B @ A
    hidden = x @ (m / V.norm(dim=1).detach()).unsqueeze(1).mul(V).T + bias
    wanted = hidden @ (alone / W_o.norm(dim=1)).unsqueeze(1).mul(W_o).T + bias_o
    ours = model["o_proj"](model["q_proj"](x))
    torch.testing.assert_close(ours, wanted)
    theirs = torch.autograd.grad(wanted.square().sum(), [alone, m, A, B])
    mine = ("o_proj.lora_magnitude_vector", "q_proj.lora_magnitude_vector", "q_proj.lora_A", "q_proj.lora_B")
    for one, other in zip(torch.autograd.grad(ours.square().sum(), [own[name] for name in mine]), theirs, strict=True):
        torch.testing.assert_close(one, other)


WIDTH = 400
# Deviations of those that start normal; zero: as zeros. All others start as PyTorch's linear does.
NORMAL = {
    ("moelora", "mixture_A"): 0.01,
    ("moelora", "mixture_task_embedding"): 1.0,
    ("mixlora", "mixture_router_down"): 0.02,
    ("meteora", "mixture_router_down"): 1.0,
    ("cat", "mixture_logits_down"): 1.0,
}


@pytest.mark.parametrize("name", [name for name in VERIFIED if METHODS[name].backend == "ours"])
def test_tensors_of_a_verified_row_start_as_its_code_starts_them(name: str) -> None:
    row = METHODS[name]
    many = {"down": {"experts": WIDTH}, "up": {"experts": WIDTH}} if name == "cat" else {}
    config = MixtureConfig(method=name, num_tasks=WIDTH if row.gates.reads_task else None, **many)
    place = Place("model.layers.0.mlp.gate_proj", WIDTH, WIDTH, 4, WIDTH)
    spec = linear_spec(config, place)
    torch.manual_seed(0)
    for tensor_name, shape in spec.shapes.items():
        start = initial_tensor(tensor_name, shape, config, spec)
        if tensor_name == "mixture_B" or "bias" in tensor_name:
            assert not start.any()
        elif config.init == "sparse" and tensor_name == "mixture_A":
            assert ((start != 0).sum(-1) == WIDTH * 8 // 32).all()
        else:
            check_start(start, NORMAL.get((name, tensor_name)))


def check_start(start: Tensor, deviation: float | None) -> None:
    wanted = deviation or 1 / math.sqrt(3 * start.shape[-1])
    # Five deviations of a sample's deviation, which is largest for normal numbers.
    assert abs(float(start.std()) / wanted - 1) < 5 / math.sqrt(2 * start.numel())
    if deviation is None:
        assert float(start.abs().max()) <= 1 / math.sqrt(start.shape[-1])
