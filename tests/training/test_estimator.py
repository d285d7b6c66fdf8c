"""The gradient of a router that samples, against the exact gradient of the expected loss."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from qd2mora.mixture import MixtureConfig, MixtureLinear, Routing
from qd2mora.mixture.draws import mixed
from qd2mora.training.estimator import backward_over_draws, leave_one_out


def test_advantages_sum_to_zero_and_stretch_the_distance_from_the_mean() -> None:
    losses = torch.randn(5, 3, dtype=torch.float64)
    advantages = leave_one_out(losses)
    torch.testing.assert_close(advantages.sum(0), torch.zeros(3, dtype=torch.float64))
    for draw in range(5):
        others = torch.cat([losses[:draw], losses[draw + 1 :]]).mean(0)
        torch.testing.assert_close(advantages[draw], losses[draw] - others)


THREE = {"experts": 3}


def made() -> tuple[MixtureLinear, Tensor, Tensor]:
    torch.manual_seed(0)
    config = MixtureConfig(method="remix", rank=2, alpha=2, down={"experts": 3}, up={"experts": 3})
    linear = nn.Linear(4, 3).requires_grad_(False)
    layer = MixtureLinear(linear, "default", config, Routing())
    for tensor in layer.tensors("default").values():
        nn.init.normal_(tensor)
    return layer.train(), torch.randn(1, 1, 4), torch.randn(1, 1, 3)


@pytest.mark.parametrize(("top_k", "rank"), [(1, 2), (2, 2), (2, 4)])
def test_each_expert_drawn_weighs_two_over_k_times_the_rank(top_k: int, rank: int) -> None:
    config = MixtureConfig(
        method="remix", rank=rank, down=THREE, up=THREE, gates={"down": {"top_k": top_k}}, target_modules=["q"]
    )
    layer = MixtureLinear(nn.Linear(4, 3).requires_grad_(False), "default", config, Routing()).double().eval()
    for tensor in layer.tensors("default").values():
        nn.init.normal_(tensor)
    x, t = torch.randn(1, 1, 4, dtype=torch.float64), layer.tensors("default")
    likeliest = (t["mixture_router_down"] @ x[0, 0]).topk(top_k).indices.tolist()
    wanted = layer.base_layer(x[0, 0])
    for expert in likeliest:
        wanted = wanted + 2 / (top_k * rank) * t["mixture_B"][expert] @ (t["mixture_A"][expert] @ x[0, 0])
    torch.testing.assert_close(layer(x)[0, 0], wanted)


@pytest.mark.parametrize("draws", [2, 3, 7])
def test_a_step_runs_the_model_twice_a_draw_and_its_gradient_is_leave_one_out(draws: int) -> None:
    """The router's gradient of every draw alone, by autograd over the log-probability of what was drawn."""
    layer, x, goal = made()
    layer, x, goal = layer.double(), x.double(), goal.double()
    layer.routing.rows, layer.routing.lengths = (11,), (1,)
    losses: list[Tensor] = []

    def row_losses() -> Tensor:
        losses.append((layer(x) - goal).square().sum((1, 2)))
        return losses[-1]

    backward_over_draws(row_losses, Tensor.backward, layer.routing, 1.0, draws)
    assert len(losses) == 2 * draws
    router, total = layer.tensors("default")["mixture_router_down"], torch.zeros(3, 4, dtype=torch.float64)
    values = [float(loss.detach()) for loss in losses[:draws]]
    for number, value in enumerate(values):
        rest = [each for place, each in enumerate(values) if place != number]
        copy = router.detach().clone().requires_grad_()
        scores = copy @ x[0, 0]
        noise = layer.routing.__class__(rows=(mixed(11, number),), lengths=(1,)).draws(layer.layer_key)
        order = (scores.detach() + noise.gumbel(scores.view(1, 1, 3), 1001)[0, 0]).topk(2).indices
        log = (
            scores.log_softmax(-1)[order[0]]
            + torch.log_softmax(scores.masked_fill(torch.arange(3) == order[0], -torch.inf), -1)[order[1]]
        )
        total += (value - sum(rest) / len(rest)) / draws * torch.autograd.grad(log, copy)[0]
    torch.testing.assert_close(router.grad, total)


def exact_gradient(layer: MixtureLinear, x: Tensor, goal: Tensor) -> Tensor:
    """Differentiate sum over ordered pairs of P(pair) * loss(pair), each pair's output formed by hand."""
    tensors = {name: tensor.detach().double() for name, tensor in layer.tensors("default").items()}
    router = tensors["mixture_router_down"].clone().requires_grad_()
    probs = (router @ x[0, 0].double()).softmax(-1)
    base = layer.base_layer(x)[0, 0].double()
    outs = [up @ (down @ x[0, 0].double()) for down, up in zip(tensors["mixture_A"], tensors["mixture_B"], strict=True)]
    expected = torch.zeros((), dtype=torch.float64)
    for first, second in itertools.permutations(range(3), 2):
        chance = probs[first] * probs[second] / (1 - probs[first])
        y = base + layer.scaling("default") * 0.5 * (outs[first] + outs[second])
        expected = expected + chance * (y - goal[0, 0].double()).square().sum()
    return torch.autograd.grad(expected, router)[0]


def test_the_routers_gradient_is_that_of_the_expected_loss() -> None:
    layer, x, goal = made()
    wanted, rounds = exact_gradient(layer, x, goal), 3000
    router = layer.tensors("default")["mixture_router_down"]
    # One row a round: the same token again and again, each time with draws of its own.
    rows = x.expand(rounds, 1, 4)
    layer.routing.rows, layer.routing.lengths = tuple(mixed(7, number) for number in range(rounds)), (1,) * rounds
    backward_over_draws(
        lambda: (layer(rows) - goal).square().sum((1, 2)), Tensor.backward, layer.routing, 1 / rounds, 4
    )
    assert router.grad is not None
    # The standard error of 3000 rounds of four draws on this toy is about 2% of the gradient.
    assert (router.grad.double() - wanted).norm() <= 0.08 * wanted.norm()


def test_a_step_of_draws_is_the_same_again_from_the_same_keys() -> None:
    layer, x, goal = made()
    gradients = []
    for _ in range(2):
        layer.routing.rows, layer.routing.lengths = (11,), (1,)
        layer.zero_grad()
        loss = backward_over_draws(
            lambda: (layer(x) - goal).square().sum((1, 2)), Tensor.backward, layer.routing, 0.5, 4
        )
        gradients.append(
            {name: tensor.grad.clone() for name, tensor in layer.named_parameters() if tensor.grad is not None}
        )
        assert layer.routing.rows == (11,) and layer.routing.advantage is None and loss > 0
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 3
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_sampling_needs_a_key_for_each_row() -> None:
    layer, x, _ = made()
    with pytest.raises(AssertionError, match="key"):
        backward_over_draws(lambda: layer(x).sum((1, 2)), Tensor.backward, layer.routing, 1.0, 4)
