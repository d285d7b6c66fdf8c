"""The layer against slow float64 twins, and what must hold whatever the numbers are."""

import bitsandbytes as bnb
import pytest
import reference
import torch
from torch import Tensor, nn

from qd2mora.base import dense_weight
from qd2mora.errors import InputRefused
from qd2mora.mixture import MixtureConfig, MixtureLinear
from qd2mora.mixture.fused import add_mixture
from qd2mora.mixture.layer import Routing

D_IN, D_OUT, RANK, TASKS = 13, 7, 3, 4
COUNTS = {"d2mora": (3, 5), "lora": (1, 1), "hydralora": (1, 5), "moslora": (1, 1), "moelora": (4, 4)}


def make_config(method: str, **changes: object) -> MixtureConfig:
    down, up = COUNTS[method]
    settings: dict[str, object] = {
        "method": method,
        "rank": RANK,
        "alpha": 5.0,
        "down": {"experts": down},
        "up": {"experts": up},
        "num_tasks": TASKS if method == "moelora" else None,
    }
    return MixtureConfig(**(settings | changes))


def make_layer(method: str, linear: nn.Linear | None = None, **changes: object) -> MixtureLinear:
    """A layer whose every tensor is random, so that routing matters."""
    torch.manual_seed(0)
    linear = linear or nn.Linear(D_IN, D_OUT)
    linear.requires_grad_(False)
    layer = MixtureLinear(linear, "default", make_config(method, **changes), Routing(torch.tensor([2, 0])))
    for tensor in layer.tensors("default").values():
        nn.init.normal_(tensor)
    return layer


def gradients(y: Tensor, dy: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(y, leaves, dy))


@pytest.mark.parametrize("method", COUNTS)
def test_output_and_every_gradient_equal_the_loop_over_tokens_and_experts(method: str) -> None:
    layer = make_layer(method)
    x = torch.randn(2, 6, D_IN, requires_grad=True)
    dy = torch.randn(2, 6, D_OUT)
    tensors = layer.tensors("default")
    y = layer(x)
    ours = gradients(y, dy, [x, *tensors.values()])
    x64 = x.detach().double().requires_grad_()
    copies = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    tasks = torch.tensor([2] * 6 + [0] * 6)
    update = reference.delta(method, x64.view(-1, D_IN), copies, layer.mixture_config["default"].scaling, tasks)
    linear = layer.get_base_layer()
    wanted = x64 @ linear.weight.double().T + linear.bias.double() + update.view(2, 6, D_OUT)
    theirs = gradients(wanted, dy.double(), [x64, *copies.values()])
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    for name, mine, other in zip(["x", *tensors], ours, theirs, strict=True):
        assert (mine.double() - other).norm() <= 1e-5 * other.norm(), name


@pytest.mark.parametrize("method", COUNTS)
@pytest.mark.parametrize("num_masks", [0, 1, 2])
def test_the_fast_form_passes_finite_differences(method: str, num_masks: int) -> None:
    layer = make_layer(method) if method != "d2mora" else make_layer(method, down={"experts": 4})
    config = layer.mixture_config["default"]
    if num_masks > 1 and config.num_down % num_masks:
        pytest.skip("masks are one, or one a down expert")
    tensors = {name: tensor.detach().double() for name, tensor in layer.tensors("default").items()}
    x = torch.randn(2, 3, D_IN, dtype=torch.float64)
    weight = torch.randn(D_OUT, D_IN, dtype=torch.float64)
    router_x = tensors.get("mixture_router_up" if method == "hydralora" else "mixture_router_down")
    router_z = None if method == "hydralora" else tensors.get("mixture_router_up")
    pair = torch.rand(2, 1, 4, dtype=torch.float64) if method == "moelora" else None
    optional = {"router_x": router_x, "router_z": router_z, "core": tensors.get("mixture_core"), "gate_pair": pair}
    used = {name: tensor for name, tensor in optional.items() if tensor is not None}

    def run(x: Tensor, A: Tensor, B: Tensor, *rest: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same masks at every evaluation
        dropout = {"dropout": 0.3, "num_masks": num_masks} if num_masks else {}
        named = dict(zip(used, rest, strict=True))
        return add_mixture(x @ weight.T, x, A, B, config.step, 0.7, **named, **dropout)

    inputs = [x, tensors["mixture_A"], tensors["mixture_B"], *used.values()]
    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in inputs])


@pytest.mark.parametrize("method", COUNTS)
def test_zero_up_experts_are_the_identity_for_any_router(method: str) -> None:
    layer = make_layer(method)
    layer.tensors("default")["mixture_B"].data.zero_()
    x = torch.randn(2, 5, D_IN)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("method", COUNTS)
def test_a_fresh_adapter_changes_nothing(method: str) -> None:
    layer = MixtureLinear(nn.Linear(D_IN, D_OUT), "default", make_config(method), Routing(torch.tensor([0, 1])))
    x = torch.randn(2, 5, D_IN)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_one_expert_of_each_is_plain_lora() -> None:
    one = {"experts": 1}
    layer, lora = make_layer("d2mora", down=one, up=one), make_layer("lora")
    for name in ("mixture_A", "mixture_B"):
        lora.tensors("default")[name].data.copy_(layer.tensors("default")[name])
    lora.base_layer.load_state_dict(layer.base_layer.state_dict())
    x = torch.randn(4, D_IN)
    torch.testing.assert_close(layer(x), lora(x))


def test_equal_experts_make_the_routers_irrelevant() -> None:
    layer = make_layer("d2mora")
    tensors = layer.tensors("default")
    for name in ("mixture_A", "mixture_B"):
        tensors[name].data.copy_(tensors[name].data[:1].expand_as(tensors[name]).clone())
    x = torch.randn(4, D_IN)
    before = layer(x)
    for name in ("mixture_router_down", "mixture_router_up"):
        nn.init.normal_(tensors[name], std=3.0)
    torch.testing.assert_close(layer(x), before)


def test_permuting_experts_with_their_routers_changes_nothing() -> None:
    layer = make_layer("d2mora")
    tensors = layer.tensors("default")
    x = torch.randn(4, D_IN)
    before = layer(x)
    for bank, router, order in (
        ("mixture_A", "mixture_router_down", [2, 0, 1]),
        ("mixture_B", "mixture_router_up", [4, 2, 0, 1, 3]),
    ):
        for name in (bank, router):
            tensors[name].data.copy_(tensors[name].data[order].clone())
    torch.testing.assert_close(layer(x), before)


@pytest.mark.parametrize("method", COUNTS)
def test_the_mixing_matrix_turns_u_into_v(method: str) -> None:
    layer = make_layer(method)
    x = torch.randn(2, 5, D_IN)
    u, v = layer.rank_space(x, "default")
    torch.testing.assert_close((layer.mixing(x, "default") @ u.unsqueeze(-1)).squeeze(-1), v)


def test_gates_of_both_sides_sum_to_one() -> None:
    layer = make_layer("d2mora")
    mixing = layer.mixing(torch.randn(9, D_IN), "default")
    blocks = mixing.unflatten(-1, (3, RANK)).unflatten(-3, (5, RANK))
    torch.testing.assert_close(blocks.diagonal(dim1=-3, dim2=-1)[..., 0].sum((-1, -2)), torch.ones(9))


def nf4(weight: Tensor) -> bnb.nn.Linear4bit:
    linear = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
    linear.support_avx512bf16_for_cpu = False
    return linear


@pytest.mark.parametrize("method", COUNTS)
def test_on_4_bit_weights_output_and_gradients_equal_those_on_the_dequantised(method: str) -> None:
    quantised = nf4(torch.randn(32, 64))
    dense = nn.Linear(64, 32, bias=False)
    dense.weight.data.copy_(dense_weight(quantised))
    results = []
    for linear in (quantised, dense):
        layer = make_layer(method, linear)
        torch.manual_seed(5)
        x = torch.randn(2, 4, 64, requires_grad=True)
        y = layer(x)
        leaves = [x, *layer.tensors("default").values()]
        results.append([y.detach(), *gradients(y, torch.ones_like(y), leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_routers_read_x_undropped() -> None:
    layer = make_layer("d2mora", dropout=0.5)
    tensors = layer.tensors("default")
    # With A zero the code z is zero, so both gates depend on the routers alone; a dropped x would move the down gate.
    tensors["mixture_A"].data.copy_(torch.ones_like(tensors["mixture_A"]))
    tensors["mixture_A"].data[1:] = 0
    x = torch.randn(4, D_IN, requires_grad=True)
    layer.train()
    torch.manual_seed(0)
    y = layer(x)
    (drouter,) = torch.autograd.grad(y.sum(), [tensors["mixture_router_down"]])
    # The router's gradient is an outer product with x itself: no column of it may vanish.
    assert (drouter.abs().sum(0) > 0).all()


@pytest.mark.parametrize("per_expert", [False, True])
def test_dropout_draws_one_mask_for_all_experts_or_one_for_each(per_expert: bool) -> None:
    layer = make_layer("d2mora", dropout=0.5, dropout_per_expert=per_expert)
    tensors = layer.tensors("default")
    tensors["mixture_A"].data.copy_(torch.eye(RANK, D_IN).expand(3, -1, -1))
    for name in ("mixture_router_down", "mixture_router_up"):
        tensors[name].data.zero_()
    up = torch.zeros(5, D_OUT, RANK)
    up[:, :RANK] = torch.eye(RANK)
    tensors["mixture_B"].data.copy_(up)
    layer.train()
    x = torch.ones(200, D_IN)
    z = (layer(x) - layer.base_layer(x)).detach()[:, :RANK] / layer.mixture_config["default"].scaling
    levels = {round(float(value), 3) for value in z.flatten()}
    # A kept entry counts 2; the mean over three experts takes two levels with one mask and four with three.
    assert levels == ({0.0, 0.667, 1.333, 2.0} if per_expert else {0.0, 2.0})


def test_evaluation_drops_nothing() -> None:
    layer = make_layer("d2mora", dropout=0.9).eval()
    x = torch.randn(4, D_IN)
    assert torch.equal(layer(x), layer(x))


def test_sixteen_bit_inputs_give_sixteen_bit_outputs_with_gates_in_float32() -> None:
    layer = make_layer("d2mora", nn.Linear(D_IN, D_OUT).bfloat16())
    x = torch.randn(5, D_IN).bfloat16()
    assert layer(x).dtype is torch.bfloat16
    assert layer.mixing(x, "default").dtype is torch.float32


def test_nothing_as_wide_as_the_output_is_kept_for_the_backward_pass() -> None:
    layer = make_layer("d2mora", nn.Linear(64, 96))
    x = torch.randn(10, 64, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad or not tensor.is_leaf:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    for frozen in (x, layer.base_layer.weight):
        kept.pop(frozen.untyped_storage().data_ptr(), None)
    # u alone: three down experts of rank 3 and three router logits a token, float32.
    assert sum(kept.values()) == 10 * (3 * RANK + 3) * 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"method": "d2mroa"}, "d2mora"),
        ({"method": "hydralora", "down": {"experts": 2}}, "down"),
        ({"method": "lora", "up": {"experts": 2}}, "up"),
        ({"method": "moelora", "num_tasks": None}, "num_tasks"),
        ({"method": "moelora", "num_tasks": 2, "down": {"experts": 3}, "up": {"experts": 4}}, "pairs"),
        ({"up": {"expert": 3}}, "experts"),
        ({"task_embedding": 8}, "task"),
    ],
)
def test_values_that_a_method_forbids_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(InputRefused, match=words):
        MixtureConfig(**changes)


def test_routing_by_task_needs_a_task_it_knows() -> None:
    layer = make_layer("moelora")
    x = torch.randn(2, 3, D_IN)
    layer.routing.task_index = None
    with pytest.raises(ValueError, match="task_index"):
        layer(x)
    layer.routing.task_index = torch.tensor([0, TASKS])
    with pytest.raises(ValueError, match="outside"):
        layer(x)
