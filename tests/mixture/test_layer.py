"""The layer against slow float64 twins, and what must hold whatever the numbers are."""

import bitsandbytes as bnb
import pytest
import torch
from checked_layers import (
    ALPHA,
    BANKS,
    COUNTS,
    D_IN,
    D_OUT,
    RANK,
    SCALING,
    TASKS,
    check_against_reference,
    gradients,
    make_config,
    make_layer,
    reference_output,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qd2mora.errors import InputRefused
from qd2mora.mixture import MixtureConfig, MixtureLinear, Routing


@pytest.mark.parametrize("method", COUNTS)
@pytest.mark.parametrize("shape", [(2, 6), (2,), (2, 1)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_output_and_every_gradient_equal_the_loop_over_tokens_and_experts(
    method: str, shape: tuple[int, ...], bias: bool
) -> None:
    layer = make_layer(method, nn.Linear(D_IN, D_OUT, bias=bias))
    check_against_reference(layer, torch.randn(*shape, D_IN, requires_grad=True))


@pytest.mark.parametrize("method", COUNTS)
def test_gradients_hold_where_the_input_needs_none(method: str) -> None:
    check_against_reference(make_layer(method), torch.randn(2, 6, D_IN))


@pytest.mark.parametrize("frozen", ["mixture_A", "mixture_B", "mixture_router_down", "mixture_router_up"])
def test_freezing_one_tensor_leaves_the_gradients_of_the_others(frozen: str) -> None:
    layer = make_layer("d2mora")
    x = torch.randn(2, 6, D_IN, requires_grad=True)
    leaves = [tensor for name, tensor in layer.tensors("default").items() if name != frozen]
    before = gradients(layer(x).sum(), torch.ones(()), leaves)
    layer.tensors("default")[frozen].requires_grad_(False)
    for ours, wanted in zip(gradients(layer(x).sum(), torch.ones(()), leaves), before, strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize(
    ("method", "dropout", "per_expert"),
    [
        *((method, dropout, False) for method in COUNTS for dropout in (0.0, 0.3)),
        ("d2mora", 0.3, True),
        ("moelora", 0.3, True),
    ],
)
def test_the_fast_form_passes_finite_differences(method: str, dropout: float, per_expert: bool) -> None:
    layer = make_layer(method, dropout=dropout, dropout_per_expert=per_expert).double().train()
    named = {name: tensor for name, tensor in layer.named_parameters() if "mixture_" in name}
    x = torch.randn(2, 3, D_IN, dtype=torch.float64)

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same masks at every evaluation
        return torch.func.functional_call(layer, dict(zip(named, tensors, strict=True)), (x,))

    inputs = [x, *(tensor.detach().clone() for tensor in named.values())]
    # Along random directions: each entry by itself takes a pass of its own.
    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in inputs], fast_mode=True)


@pytest.mark.parametrize("method", COUNTS)
def test_zero_up_experts_are_the_identity_for_any_router(method: str) -> None:
    layer = make_layer(method)
    layer.tensors("default")["mixture_B"].data.zero_()
    x = torch.randn(2, 5, D_IN)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("method", COUNTS)
def test_a_fresh_adapter_changes_nothing(method: str) -> None:
    layer = MixtureLinear(
        nn.Linear(D_IN, D_OUT), "default", make_config(method), Routing(task_index=torch.tensor([0, 1]))
    )
    x = torch.randn(2, 5, D_IN)
    assert torch.equal(layer(x), layer.base_layer(x))


def lora_like(layer: MixtureLinear, scaling: float) -> MixtureLinear:
    """A plain LoRA of the layer's first experts on the same base."""
    lora = make_layer("lora", layer.get_base_layer(), alpha=scaling * RANK)
    for name in BANKS:
        lora.tensors("default")[name].data.copy_(layer.tensors("default")[name][:1])
    return lora


@pytest.mark.parametrize("method", ["d2mora", "hydralora", "moelora"])
def test_one_expert_of_each_is_plain_lora(method: str) -> None:
    one = {"experts": 1}
    layer = make_layer(method, down=one, up=one)
    x = torch.randn(2, 4, D_IN)
    torch.testing.assert_close(layer(x), lora_like(layer, ALPHA / RANK)(x))


@pytest.mark.parametrize("method", ["d2mora", "hydralora", "moelora"])
def test_equal_experts_are_one_lora_whatever_the_routers(method: str) -> None:
    layer = make_layer(method)
    tensors = layer.tensors("default")
    for name in BANKS:
        tensors[name].data.copy_(tensors[name].data[:1].expand_as(tensors[name]).clone())
    lora = lora_like(layer, SCALING[method])
    x = torch.randn(2, 4, D_IN)
    for spread in (1.0, 3.0):
        for name in ("mixture_router_down", "mixture_router_up", "mixture_router_task"):
            if name in tensors:
                nn.init.normal_(tensors[name], std=spread)
        torch.testing.assert_close(layer(x), lora(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "orders"),
    [
        ("d2mora", {("mixture_A", "mixture_router_down"): [2, 0, 1]}),
        ("d2mora", {("mixture_B", "mixture_router_up"): [4, 2, 0, 1, 3]}),
        ("hydralora", {("mixture_B", "mixture_router_up"): [4, 2, 0, 1, 3]}),
        ("moelora", {("mixture_A", "mixture_B", "mixture_router_task"): [3, 0, 2, 1]}),
    ],
)
def test_permuting_experts_with_their_routers_changes_nothing(
    method: str, orders: dict[tuple[str, ...], list[int]]
) -> None:
    layer = make_layer(method)
    tensors = layer.tensors("default")
    x = torch.randn(2, 4, D_IN)
    before = layer(x)
    ((names, order),) = orders.items()
    for number, name in enumerate(names, start=1):
        tensors[name].data.copy_(tensors[name].data[order].clone())
        # Half of the permutation does change the output, so that the whole is worth something.
        assert torch.allclose(layer(x), before, atol=1e-4) == (number == len(names))


@pytest.mark.parametrize("method", COUNTS)
def test_the_mixing_matrix_turns_u_into_v(method: str) -> None:
    layer = make_layer(method)
    x = torch.randn(2, 5, D_IN)
    u, v = layer.rank_space(x, "default")
    torch.testing.assert_close((layer.mixing(x, "default") @ u.unsqueeze(-1)).squeeze(-1), v)


@pytest.mark.parametrize("method", COUNTS)
@pytest.mark.parametrize("shared", [None, {"rank": 2, "alpha": 7}])
def test_a_watcher_sees_rank_space_and_can_sum_mixing(method: str, shared: dict[str, int] | None) -> None:
    """By the gates' product where K_t is one, by K_t itself elsewhere."""
    layer = make_layer(method, shared=shared)
    x, weight = torch.randn(2, 5, D_IN), torch.rand(2, 5)
    mixing, seen = layer.mixing(x, "default"), []
    layer.watchers["default"] = lambda u, v, small: seen.append((u, v, small))
    layer(x)
    ((u, v, small),) = seen
    wanted = layer.rank_space(x, "default", with_routers=True)
    torch.testing.assert_close((u, v), wanted)
    found = layer.mixture_spec["default"].step.summed_mixing(u, small, weight)
    torch.testing.assert_close(found, (weight[..., None, None] * mixing).sum((0, 1)))


def test_gates_of_both_sides_sum_to_one() -> None:
    layer = make_layer("d2mora")
    mixing = layer.mixing(torch.randn(9, D_IN), "default")
    blocks = mixing.unflatten(-1, (3, RANK)).unflatten(-3, (5, RANK))
    torch.testing.assert_close(blocks.diagonal(dim1=-3, dim2=-1)[..., 0].sum((-1, -2)), torch.ones(9))


def nf4(weight: Tensor, bias: Tensor | None = None) -> bnb.nn.Linear4bit:
    linear = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=bias is not None, compute_dtype=torch.float32, quant_type="nf4"
    )
    if bias is not None:
        linear.bias.data.copy_(bias)
    linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
    linear.support_avx512bf16_for_cpu = False
    return linear


@pytest.mark.parametrize("method", COUNTS)
@pytest.mark.parametrize("shape", [(2, 4), (2,), (2, 1)], ids=str)
def test_on_4_bit_weights_output_and_gradients_equal_those_on_the_dequantised(
    method: str, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(3)
    quantised = nf4(torch.randn(32, 64))
    layer = make_layer(method, quantised)
    for tensor in layer.tensors("default").values():
        tensor.data.mul_(0.3)  # 64 inputs: keeps gates away from one-hot
    check_against_reference(layer, torch.randn(*shape, 64, requires_grad=True))


@pytest.mark.parametrize("shape", [(2, 4), (2,)], ids=str)
@pytest.mark.parametrize("needs_grad", [True, False], ids=["inner layer", "first layer"])
def test_4_bit_weights_with_a_bias_take_an_adapter(shape: tuple[int, ...], needs_grad: bool) -> None:
    layer = make_layer("d2mora", nf4(torch.randn(32, 64), bias=torch.randn(32)))
    for tensor in layer.tensors("default").values():
        tensor.data.mul_(0.3)
    check_against_reference(layer, torch.randn(*shape, 64, requires_grad=needs_grad))


class _Dtypes(TorchDispatchMode):
    """Notes the dtype of every softmax and every plain product."""

    def __init__(self) -> None:
        super().__init__()
        self.softmaxes: list[torch.dtype] = []
        self.products: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._softmax.default:
            self.softmaxes.append(args[0].dtype)
        if func is torch.ops.aten.mm.default:
            self.products.append(args[0].dtype)
        return result


@pytest.mark.parametrize(("method", "num_gates"), [("d2mora", 2), ("hydralora", 1), ("moelora", 1), ("moslora", 0)])
@pytest.mark.parametrize("autocast", [False, True], ids=["16-bit base", "autocast"])
def test_sixteen_bit_inputs_give_sixteen_bit_outputs_with_rank_space_in_float32(
    method: str, num_gates: int, autocast: bool
) -> None:
    linear = nn.Linear(D_IN, D_OUT)
    layer = make_layer(method, linear if autocast else linear.bfloat16())
    for tensor in layer.tensors("default").values():
        tensor.data = tensor.data.float()  # as PEFT keeps adapters
    x = torch.randn(2, 5, D_IN, dtype=torch.float32 if autocast else torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), _Dtypes() as seen:
        y = layer(x)
    assert y.dtype is torch.bfloat16
    assert seen.softmaxes == [torch.float32] * num_gates
    # One product over the input's width, in 16 bits; a task's gate comes before it, a router of z or a core after.
    before, after = [torch.float32] * (method == "moelora"), [torch.float32] * (method in ("d2mora", "moslora"))
    assert seen.products == [*before, torch.bfloat16, *after]
    y.float().square().mean().backward()
    assert x.grad.dtype is x.dtype
    for tensor in layer.tensors("default").values():
        assert tensor.grad.dtype is torch.float32
        assert torch.isfinite(tensor.grad).all() and tensor.grad.any()


@pytest.mark.parametrize("method", COUNTS)
def test_in_sixteen_bits_the_update_is_off_by_roundings_alone(method: str) -> None:
    layer = make_layer(method, nn.Linear(D_IN, D_OUT).bfloat16())
    for tensor in layer.tensors("default").values():
        tensor.data.mul_(0.5)
    x = torch.randn(2, 5, D_IN).bfloat16()
    copies = {name: tensor.detach().double() for name, tensor in layer.tensors("default").items()}
    wanted = reference_output(layer, x.double(), copies, [2, 0])
    # Four roundings on the way (A and x A, v, B, y), 2**-9 each, with room for gates that they move.
    assert (layer(x).double() - wanted).norm() <= 8 * 2**-9 * wanted.norm()


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
        ({"rank": -1}, "rank"),
        ({"alpha": float("nan")}, "alpha"),
        ({"dropout": -0.1}, "dropout"),
        ({"down": {"experts": 0}}, "down"),
        ({"method": "moelora", "num_tasks": -1}, "num_tasks"),
        ({"method": "moelora", "num_tasks": 2, "task_embedding": 0}, "task_embedding"),
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
    layer.routing.task_index = torch.tensor([0, TASKS - 1])
    layer(x)
    for outside in (TASKS, -1):
        layer.routing.task_index = torch.tensor([0, outside])
        with pytest.raises(ValueError, match="outside"):
            layer(x)
