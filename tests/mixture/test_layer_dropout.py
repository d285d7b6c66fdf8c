"""Where dropout strikes, and where it must not."""

import pytest
import reference
import torch
from checked_layers import BANKS, D_IN, D_OUT, RANK, check_against_reference, make_layer


@pytest.mark.parametrize("per_expert", [False, True])
def test_the_down_router_reads_x_undropped(per_expert: bool) -> None:
    """Two experts read feature 0 alone, each into its own entry of z; the router reads every other feature.

    Where feature 0 is kept, the entries are as the gates are, and those must be as without dropout.
    """
    two = {"experts": 2}
    layer = make_layer("d2mora", down=two, up={"experts": 1}, dropout=0.5, dropout_per_expert=per_expert)
    tensors = layer.tensors("default")
    for name in BANKS:
        tensors[name].data.zero_()
    tensors["mixture_A"].data[0, 0, 0] = tensors["mixture_A"].data[1, 1, 0] = 1.0
    tensors["mixture_B"].data[0, :RANK] = torch.eye(RANK)
    tensors["mixture_router_down"].data[:, 0] = 0
    x = torch.randn(200, D_IN)
    x[:, 0] = 1
    z = (layer.train()(x) - layer.base_layer(x)).detach()
    kept = (z[:, :2] != 0).all(-1)
    assert 10 < kept.sum() < 190
    gates = torch.stack([reference.softmax(tensors["mixture_router_down"].detach() @ token) for token in x[kept]])
    ratio = z[kept, :2] / z[kept, :2].sum(-1, keepdim=True)
    torch.testing.assert_close(ratio, gates, rtol=1e-3, atol=1e-3)


def test_an_up_router_that_reads_x_reads_it_undropped() -> None:
    """Each up expert writes an entry of its own, so that outputs are as the gates are, wherever z is not dropped."""
    layer = make_layer("hydralora", up={"experts": 2}, dropout=0.5)
    tensors = layer.tensors("default")
    for name in BANKS:
        tensors[name].data.zero_()
    tensors["mixture_A"].data[0, 0, 0] = 1.0
    tensors["mixture_B"].data[0, 0, 0] = tensors["mixture_B"].data[1, 1, 0] = 1.0
    x = torch.randn(200, D_IN)
    x[:, 0] = 1
    update = (layer.train()(x) - layer.base_layer(x)).detach()[:, :2]
    kept = (update != 0).all(-1)
    assert 10 < kept.sum() < 190
    gates = torch.stack([reference.softmax(tensors["mixture_router_up"].detach() @ token) for token in x[kept]])
    torch.testing.assert_close(update[kept] / update[kept].sum(-1, keepdim=True), gates, rtol=1e-3, atol=1e-3)


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
    check_against_reference(layer, torch.randn(2, 6, D_IN, requires_grad=True))


def test_dropout_follows_the_seed_and_differs_from_call_to_call() -> None:
    layer = make_layer("lora", dropout=0.5).train()
    x = torch.randn(2, 4, D_IN)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.allclose(first, second)


def test_dropout_keeps_the_mean() -> None:
    layer = make_layer("lora", dropout=0.25).train()
    x = torch.randn(1, D_IN)
    dropped = layer(x.expand(20_000, -1)).detach().mean(0)
    kept = layer.eval()(x).detach()[0]
    # The deviation of the mean of 20,000 masks, from the spread of one: sqrt(p / (1 - p)) of each feature's part.
    parts = layer.get_delta_weight("default").detach() * x
    deviation = (0.25 / 0.75 / 20_000 * parts.square().sum(-1)).sqrt()
    assert ((dropped - kept).abs() < 5 * deviation).all()
