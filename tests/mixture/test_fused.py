"""The frozen base and the mixture as one autograd function: the same numbers as apart, whatever runs it."""

from collections.abc import Callable

import bitsandbytes as bnb
import pytest
import torch
from checked_layers import gradients, make_layer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from qd2mora.mixture import MixtureConfig, MixtureLinear, Routing, frozen

D_IN, D_OUT = 128, 96


def four_bit(
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    source: torch.dtype = torch.float32,
    double: bool = True,
    kind: str = "nf4",
    shape: tuple[int, int] = (D_OUT, D_IN),
) -> bnb.nn.Linear4bit:
    torch.manual_seed(5)
    linear = bnb.nn.Linear4bit(shape[1], shape[0], bias=bias, compute_dtype=dtype, quant_type=kind)
    weight = torch.randn(shape).to(source)
    linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind, compress_statistics=double).to(
        "cpu"
    )
    linear.support_avx512bf16_for_cpu = False
    return linear.requires_grad_(False)


def layer_on(base: nn.Module, method: str = "d2mora", **changes: object) -> MixtureLinear:
    layer = make_layer(method, base, **changes)
    for tensor in layer.tensors("default").values():
        tensor.data.mul_(0.3)
    return layer


def top_k_layer(base: nn.Module) -> MixtureLinear:
    """MoLA: pairs, of which a token uses two."""
    config = MixtureConfig(method="mola", rank=3, alpha=5.0, allocation="4", penalties={"lb_mola": 0.1})
    layer = MixtureLinear(base.requires_grad_(False), "default", config, Routing())
    torch.manual_seed(0)
    for tensor in layer.tensors("default").values():
        nn.init.normal_(tensor, std=0.3)
    return layer


def pass_through(run: Callable[[Tensor], Tensor], layer: MixtureLinear, x: Tensor) -> list[Tensor]:
    """Output, then gradients of x where it asks and of every trained tensor."""
    torch.manual_seed(9)
    y = run(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    leaves = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]
    return [y.detach(), *gradients(y, dy, leaves)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 40, 100])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("source", "double", "kind"),
    [(torch.float32, True, "nf4"), (torch.bfloat16, False, "nf4"), (torch.float16, True, "fp4")],
)
def test_without_an_update_the_output_is_bitwise_that_of_bitsandbytes(
    bias: bool, tokens: int, compute: torch.dtype, source: torch.dtype, double: bool, kind: str
) -> None:
    base = four_bit(bias, compute, source, double, kind)
    layer = layer_on(base)
    layer.tensors("default")["mixture_B"].data.zero_()
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1, tokens, D_IN).to(dtype).requires_grad_()
        assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("bias", [False, True])
def test_a_weight_dequantised_slice_by_slice_gives_the_same(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    base = four_bit(bias, shape=(200, D_IN))
    layout, x, dy = frozen.layout_of(base), torch.randn(70, D_IN), torch.randn(70, 200)
    assert layout is not None
    tensors = frozen.tensors_of(base, layout)
    whole = frozen.product(layout, tensors, x), frozen.input_gradient(layout, tensors, dy)
    monkeypatch.setattr(frozen, "CACHED_BYTES", 1)  # 64, 64 and 72 rows at once
    sliced = frozen.product(layout, tensors, x), frozen.input_gradient(layout, tensors, dy)
    assert torch.equal(sliced[0], whole[0])
    # float32 sums of 200 terms in another order.
    torch.testing.assert_close(sliced[1], whole[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "d2mora", "hydralora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["dense", "4-bit"])
def test_with_the_base_inside_all_is_as_with_the_base_outside(method: str, dtype: torch.dtype, kind: str) -> None:
    base = nn.Linear(D_IN, D_OUT).to(dtype) if kind == "dense" else four_bit(dtype=dtype)
    layer = layer_on(base, method)
    x = torch.randn(2, 20, D_IN, dtype=dtype, requires_grad=True)
    joined = pass_through(layer, layer, x)
    base.register_forward_hook(lambda *_: None)  # whoever hooks a linear wants its own forward
    apart = pass_through(layer, layer, x)
    for ours, theirs in zip(joined, apart, strict=True):
        # dx is rounded once where autograd rounds each of its two parts and their sum.
        torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps * 8)


def test_a_hook_on_the_base_is_called() -> None:
    base, calls = nn.Linear(D_IN, D_OUT), []
    layer = layer_on(base)
    base.register_forward_pre_hook(lambda *_: calls.append(1))
    layer(torch.randn(3, D_IN))
    assert calls == [1]


def test_a_base_that_trains_gets_its_gradient() -> None:
    base = nn.Linear(D_IN, D_OUT)
    layer = layer_on(base)
    base.requires_grad_(True)
    x = torch.randn(6, D_IN)
    layer(x).sum().backward()
    torch.testing.assert_close(base.weight.grad, x.sum(0).expand(D_OUT, -1))


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("needs_grad", "times"), [(True, 2), (False, 1)])
def test_an_input_that_needs_no_gradient_costs_none(needs_grad: bool, times: int) -> None:
    layer = layer_on(four_bit())
    with _Count() as count:
        layer(torch.randn(4, D_IN, requires_grad=needs_grad)).sum().backward()
    assert count.calls.count("bitsandbytes.dequantize_4bit.default") == times


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_gives_the_same_numbers(reentrant: bool, dropout: float) -> None:
    layer = layer_on(four_bit(), dropout=dropout).train()
    x = torch.randn(2, 5, D_IN, requires_grad=True)
    plain = pass_through(layer, layer, x)
    torch.manual_seed(9)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    leaves = [x, *(tensor for tensor in layer.parameters() if tensor.requires_grad)]
    for ours, theirs in zip([y, *(leaf.grad for leaf in leaves)], plain, strict=True):
        assert torch.equal(ours, theirs)


def test_autocast_leaves_the_base_to_itself_and_lowers_as_it_does() -> None:
    layer = layer_on(nn.Linear(D_IN, D_OUT))
    x = torch.randn(4, D_IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.02, atol=0.05)


def test_adapters_add_up_and_a_frozen_one_gets_no_gradient() -> None:
    layer = layer_on(four_bit())
    layer.update_layer("second", layer.mixture_config["default"], layer.mixture_spec["default"].place)
    for tensor in layer.tensors("second").values():
        nn.init.normal_(tensor, std=0.3)
    x = torch.randn(2, 3, D_IN, requires_grad=True)
    base = layer.base_layer(x).detach()
    alone = []
    for name in ("default", "second"):
        layer.set_adapter(name)
        alone.append(layer(x).detach() - base)
    layer.set_adapter(["default", "second"])
    for tensor in layer.tensors("default").values():
        tensor.requires_grad_(False)
    y = layer(x)
    torch.testing.assert_close(y.detach(), base + alone[0] + alone[1], rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert all(tensor.grad is None for tensor in layer.tensors("default").values())
    assert all(tensor.grad.any() for tensor in layer.tensors("second").values())
    assert x.grad.any()


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_equals_eager(layer: MixtureLinear, x: Tensor, backend: str) -> None:
    eager = pass_through(layer, layer, x)
    whole = torch.compile(layer, fullgraph=True, backend=backend)
    for ours, theirs in zip(pass_through(whole, layer, x), eager, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", ["dense", "4-bit", "4-bit with a bias"])
@pytest.mark.parametrize("method", ["lora", "d2mora", "hydralora", "mola"])
def test_a_compiled_layer_is_one_graph_with_the_same_numbers(method: str, kind: str) -> None:
    base = nn.Linear(D_IN, D_OUT) if kind == "dense" else four_bit(bias="bias" in kind)
    layer = top_k_layer(base) if method == "mola" else layer_on(base, method)
    compiled_equals_eager(layer.train(), torch.randn(2, 5, D_IN, requires_grad=True), "aot_eager")


@pytest.mark.usefixtures("fresh_compiler")
def test_a_layer_compiled_by_inductor_gives_the_same_numbers() -> None:
    compiled_equals_eager(layer_on(four_bit()), torch.randn(2, 5, D_IN, requires_grad=True), "inductor")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("keyed", [False, True], ids=["one seed", "a key for each row"])
def test_a_compiled_layer_drops_anew_in_every_call_and_the_same_in_its_backward_pass(keyed: bool) -> None:
    layer = layer_on(four_bit(), dropout=0.5).train()
    x = torch.randn(2, 5, D_IN, requires_grad=True)
    if keyed:
        layer.routing.rows, layer.routing.lengths = (3, 4), (5, 2)
    compiled_equals_eager(layer, x, "aot_eager")
    whole = torch.compile(layer, fullgraph=True, backend="aot_eager")
    first = whole(x)
    if keyed:
        layer.routing.rows = (5, 6)
    assert not torch.equal(whole(x), first)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_second_adapter_joins_the_same_graph() -> None:
    layer = layer_on(nn.Linear(D_IN, D_OUT))
    layer.update_layer("second", layer.mixture_config["default"], layer.mixture_spec["default"].place)
    layer.set_adapter(["default", "second"])
    for tensor in layer.tensors("second").values():
        nn.init.normal_(tensor, std=0.3)
    compiled_equals_eager(layer, torch.randn(2, 5, D_IN, requires_grad=True), "aot_eager")


@pytest.mark.usefixtures("fresh_compiler")
def test_a_penalty_reaches_the_router_of_a_compiled_layer() -> None:
    layer = top_k_layer(nn.Linear(D_IN, D_OUT)).train()
    layer.tensors("default")["mixture_B"].data.zero_()  # so that nothing but the penalty moves the router
    assert layer.mixture_spec["default"].penalties
    torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(2, 5, D_IN)).sum().backward()
    assert layer.tensors("default")["mixture_router_down"].grad.any()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_layer_drops_the_same_where_rows_are_packed(backend: str) -> None:
    """More rows than lines, and another number of them in the next batch."""
    layer = layer_on(four_bit(), dropout=0.5).train()
    layer.routing.rows, layer.routing.lengths = (3, 4, 5), (2, 3, 4)
    layer.routing.places = ((0, 0), (0, 2), (1, 0))
    compiled_equals_eager(layer, torch.randn(2, 5, D_IN, requires_grad=True), backend)
    layer.routing.rows, layer.routing.lengths = (6, 7, 8, 9), (2, 3, 2, 3)
    layer.routing.places = ((0, 0), (0, 2), (1, 0), (1, 2))
    compiled_equals_eager(layer, torch.randn(2, 5, D_IN, requires_grad=True), backend)
