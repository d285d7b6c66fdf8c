"""Mixtures of whole MLPs against a float64 loop over tokens and experts."""

import bitsandbytes as bnb
import pytest
import torch
from checked_mlps import (
    HIDDEN,
    LINEARS,
    NO_BALANCE,
    SHAPE,
    WIDE,
    Decoder,
    Mlp,
    check_against_loop,
    config,
    expert_linear,
    gates_of,
    inputs,
    layer,
    looped,
    make,
    mixed_by_linear,
    tensors,
    wake,
)
from peft import PeftModel, get_peft_model
from reference import softmax
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from qd2mora.errors import InputRefused
from qd2mora.mixture import mixture_layers


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (4, 1), (5, 3), (2, 2)])
def test_output_and_every_gradient_equal_the_loop_over_tokens_and_experts(experts: int, top_k: int) -> None:
    check_against_loop(make(config(experts, top_k)), top_k)


@pytest.mark.parametrize("weight", ["softmax", "one", "sigmoid", "uniform", "straight_through"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_weights_of_any_kind_equal_the_loop(weight: str, bias: bool) -> None:
    changes = {"top_k": 2, "weight": weight}
    check_against_loop(make(config(gates={"down": changes}), Mlp(bias)), 2, weight)


def test_a_dense_gate_is_the_explicit_sum_over_all_experts() -> None:
    changes = {"select": "all", "top_k": None, "weight": "softmax"}
    check_against_loop(make(config(3, gates={"down": changes})), 3, "softmax")


def test_a_gate_by_entropy_uses_as_many_experts_as_it_takes() -> None:
    changes = {"select": "entropy", "top_k": 1, "top_p": 0.8, "entropy_limit": 1.0, "weight": "softmax"}
    model = make(config(gates={"down": changes}))
    x = inputs()
    copies = {name: tensor.detach() for name, tensor in tensors(model).items()}
    wanted, numbers = [], set()
    for token in x.detach().reshape(-1, HIDDEN):
        ordered = softmax(copies["gate_proj.mixture_router_down"] @ token).sort(descending=True).values.cumsum(-1)
        number = max(1, int((ordered <= 0.8).sum()))
        numbers.add(number)
        wanted.append(looped(model, token, copies, number, "softmax"))
    assert len(numbers) > 1
    torch.testing.assert_close(model(x), torch.stack(wanted).view(x.shape))


def test_on_4_bit_weights_it_equals_the_loop_on_the_dequantised() -> None:
    mlp = Mlp(wide=32)
    for name in LINEARS:
        weight = getattr(mlp, name).weight.detach()
        quantised = bnb.nn.Linear4bit(
            *weight.T.shape, bias=False, compute_dtype=torch.float32, quant_type="nf4", device="meta"
        )
        quantised.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
        quantised.support_avx512bf16_for_cpu = False
        setattr(mlp, name, quantised)
    model = get_peft_model(Decoder(mlp), config()).eval()
    wake(model)
    # float32 sums of a few dozen terms against float64.
    check_against_loop(model, 2, tolerance=2e-6)


def lora_like(model: PeftModel, mlp: nn.Module) -> PeftModel:
    """A plain LoRA of the model's first experts on the same MLP."""
    lora = make(config(1, method="lora"), mlp)
    for name in LINEARS:
        for bank in ("mixture_A", "mixture_B"):
            layer(lora, name).tensors("default")[bank].data.copy_(layer(model, name).tensors("default")[bank][:1])
    return lora


def twin(seed: int = 5) -> Mlp:
    torch.manual_seed(seed)
    return Mlp()


def test_one_expert_is_lora_on_the_mlp() -> None:
    model = make(config(1, 1), twin())
    assert "mixture_router_down" not in layer(model, "gate_proj").tensors("default")
    assert torch.equal(model(inputs()), lora_like(model, twin())(inputs()))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_equal_experts_are_lora_on_the_mlp_whatever_the_router(top_k: int) -> None:
    model = make(config(4, top_k), twin())
    for name, tensor in tensors(model).items():
        if "router" not in name:
            tensor.data.copy_(tensor.data[:1].expand_as(tensor).clone())
    torch.testing.assert_close(model(inputs()), lora_like(model, twin())(inputs()))


def test_two_soft_experts_are_not_a_mixture_in_each_linear_and_one_hard_expert_is() -> None:
    for top_k, is_same in ((2, False), (1, True)):
        model = make(config(4, top_k))
        copies = {name: tensor.detach() for name, tensor in tensors(model).items()}
        each = mixed_by_linear(model, inputs().detach(), copies, top_k)
        off = float((model(inputs()).detach() - each).norm() / each.norm())
        assert (off < 1e-12) if is_same else (off > 0.05), off


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_up_experts_are_the_base_to_the_bit_for_any_router(dtype: torch.dtype) -> None:
    # The width is one of vectors: an odd tail would take torch's other exp, whatever is adapted.
    model = make(config(5, 3), Mlp(wide=64), dtype=dtype)
    for name, tensor in tensors(model).items():
        if name.endswith("mixture_B"):
            tensor.data.zero_()
    x = inputs(dtype)
    with model.disable_adapter():
        base = model(x)
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("per_expert", [False, True])
def test_gradients_under_dropout_pass_finite_differences(per_expert: bool) -> None:
    model = make(config(3, 2, rank=2, dropout=0.3, dropout_per_expert=per_expert, penalties=NO_BALANCE))
    model.train()
    named = {name: tensor for name, tensor in model.named_parameters() if "mixture_" in name}
    x = inputs()[:1, :3].detach()

    def run(x: Tensor, *values: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same masks at every evaluation
        return torch.func.functional_call(model, dict(zip(named, values, strict=True)), (x,))

    dropped = run(x, *named.values())
    assert not torch.allclose(dropped, model.eval()(x))
    model.train()
    leaves = [x, *(tensor.detach().clone() for tensor in named.values())]
    # Along random directions: each entry by itself takes a pass of its own.
    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in leaves], fast_mode=True)


def test_dropout_keeps_the_mean_of_every_linear_and_masks_differ_between_slots_where_asked() -> None:
    variances = []
    for per_expert in (False, True):
        model = make(config(2, 2, dropout=0.5, dropout_per_expert=per_expert)).train()
        down = layer(model, "down_proj")
        for name, tensor in tensors(model).items():
            if "router" in name or not name.startswith("down_proj"):
                tensor.data.zero_()
        for bank in down.tensors("default").values():
            bank.data.copy_(bank.data[:1].expand_as(bank).clone())
        x = inputs().detach()[:1, :1].expand(1, 4000, -1)
        y = model(x).detach()
        exact = model.eval()(x).detach()[0, 0]
        spread = y[0].std(0)
        assert ((y[0].mean(0) - exact).abs() < 5 * spread / 4000**0.5 + 1e-12).all()
        variances.append(float(spread.square().mean()))
    # Both slots read the same h: with a mask of its own each, the mean of the two varies by half.
    assert variances[1] / variances[0] == pytest.approx(0.5, rel=0.15)


@pytest.mark.parametrize("autocast", [False, True], ids=["16-bit base", "autocast"])
def test_in_sixteen_bits_output_and_gradients_are_off_by_roundings_alone(autocast: bool) -> None:
    mlp = Mlp() if autocast else Mlp().bfloat16()
    model = get_peft_model(Decoder(mlp), config()).eval()
    wake(model, std=0.3)
    x = inputs(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    assert y.dtype is torch.bfloat16
    copies = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors(model).items()}
    wanted = looped(model, x.detach().double(), copies, 2)
    # A dozen roundings on the way, 2**-9 each.
    assert (y.double() - wanted).norm() <= 12 * 2**-9 * wanted.norm()
    y.float().sum().backward()
    wanted.sum().backward()
    for name, tensor in tensors(model).items():
        assert tensor.grad.dtype is torch.float32
        assert (tensor.grad - copies[name].grad).norm() <= 0.05 * copies[name].grad.norm(), name


def test_the_balance_penalty_and_its_gradient_are_added_once() -> None:
    model = make(config(4, 2, penalties={"lb_mixtral": 0.1})).train()
    x = inputs()
    attended = torch.ones(SHAPE, dtype=torch.bool)
    attended[1, 3:] = False
    routing = layer(model, "gate_proj").routing
    routing.loss_scale = 8.0
    (0 * model(x, attention_mask=attended)).sum().backward()
    router = tensors(model)["gate_proj.mixture_router_down"]
    copy = router.detach().clone().requires_grad_()
    p = (x.detach() @ copy.T).softmax(-1)[attended]
    used = torch.zeros_like(p).scatter_(-1, p.topk(2, -1).indices, 1.0)
    wanted = 0.1 * 4 * (used.mean(0) * p.mean(0)).sum()
    wanted.backward()
    torch.testing.assert_close(router.grad, 8 * copy.grad)
    assert routing.take_values() == {"lb_mixtral": pytest.approx(float(wanted.detach()))}


def test_the_router_learns_from_the_balance_where_gates_pass_no_gradient() -> None:
    model = make(config(gates={"down": {"top_k": 1, "weight": "one"}})).train()
    model(inputs()).sum().backward()
    assert tensors(model)["gate_proj.mixture_router_down"].grad.any()


def test_a_selection_bias_chooses_and_its_load_is_counted_once() -> None:
    model = make(config(3, 1, gates={"down": {"top_k": 1, "bias_rate": 0.1}})).train()
    bias = tensors(model)["gate_proj.mixture_select_bias_down"]
    bias.data.copy_(torch.tensor([0.0, 0.0, 1e3]))
    model(inputs()).sum().backward()
    model.base_model.after_step()
    assert torch.equal(bias.detach(), torch.tensor([0.1, 0.1, 1e3 - 0.1], dtype=torch.float64))


def test_a_shared_expert_is_part_of_every_expert() -> None:
    model = make(config(shared={"rank": 2, "alpha": 3.0}), twin())
    x, named = inputs(), {name: tensor.detach() for name, tensor in tensors(model).items()}
    bare = make(config(), twin())
    for name, tensor in tensors(bare).items():
        tensor.data.copy_(named[name])
    for name in LINEARS:  # a shared expert is the same as a change of the frozen weight
        down, up = (named[f"{name}.mixture_shared_{bank}"] for bank in "AB")
        layer(bare, name).get_base_layer().weight.data += 3.0 / 2 * up @ down
    torch.testing.assert_close(model(x), bare(x))


@pytest.mark.parametrize("targets", [("gate_proj", "down_proj"), ("up_proj", "down_proj"), ("down_proj",)], ids=str)
def test_linears_that_are_not_named_stay_as_they_are(targets: tuple[str, ...]) -> None:
    model = make(config(target_modules=list(targets)))
    whole = make(config())
    named = {key: tensor for key, tensor in mixture_layers(model).items()}
    assert set(named) == {f"mlp.{name}" for name in targets}
    router = named[f"mlp.{targets[0]}"].tensors("default")["mixture_router_down"]
    for name in LINEARS:
        theirs = layer(whole, name).tensors("default")
        theirs["mixture_B"].data.zero_()
        for key, tensor in (named[f"mlp.{name}"].tensors("default") if name in targets else {}).items():
            if key in theirs:
                theirs[key].data.copy_(tensor)
    x = inputs()
    if targets == ("down_proj",):  # its router reads what down_proj reads
        h = F.silu(layer(whole, "gate_proj").base_layer(x)) * layer(whole, "up_proj").base_layer(x)
        gates = torch.stack([gates_of(router @ token, 2, "renorm") for token in h.reshape(-1, WIDE)])
        copies = {name: tensor.detach() for name, tensor in tensors(whole).items()}
        each = [
            sum(gate * expert_linear(whole, copies, "down_proj", e, token) for e, gate in enumerate(row))
            for token, row in zip(h.reshape(-1, WIDE), gates, strict=True)
        ]
        wanted = torch.stack(each).view(x.shape)
    else:
        layer(whole, "gate_proj").tensors("default")["mixture_router_down"].data.copy_(router)
        wanted = whole(x)
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_modules": ["gate_proj", "up_proj"]}, "down_proj"),
        ({"gates": {"down": {"scope": "module"}}}, "scope"),
        ({"target_modules": ["mlp.gate_proj", "mlp.down_proj", "head"]}, "head"),
    ],
)
def test_what_makes_no_whole_mlp_is_refused(changes: dict[str, object], words: str) -> None:
    model = Decoder(Mlp())
    model.head = nn.Linear(HIDDEN, 3)
    with pytest.raises(InputRefused, match=words):
        get_peft_model(model, config(**changes))


def test_another_adapter_beside_it_on_its_mlp_is_refused_and_alone_either_works() -> None:
    model = make(config())
    alone = model(inputs())
    model.add_adapter("other", config(1, method="lora"))
    assert torch.equal(model(inputs()), alone)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="deactivate other"):
        model(inputs())
    model.base_model.set_adapter("other")
    with model.disable_adapter():
        base = model(inputs())
    assert torch.equal(model(inputs()), base)  # a fresh LoRA
    model.base_model.set_adapter("default")
    assert torch.equal(model(inputs()), alone)
    model.delete_adapter("other")
    assert torch.equal(model(inputs()), alone)
    assert torch.equal(model.unload()(inputs()), base)


def test_a_linear_outside_its_mlp_is_refused() -> None:
    model = make(config())
    with pytest.raises(ValueError, match="inside its MLP"):
        layer(model, "up_proj")(inputs())
    model(inputs())
    assert not layer(model, "up_proj").routing.slots
