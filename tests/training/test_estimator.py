"""The gradient of a router that samples, against the exact gradient of the expected loss."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from qd2mora.mixture import MixtureConfig, MixtureLinear, Routing
from qd2mora.mixture.draws import mixed
from qd2mora.mixture.moved_bias import moved_bias
from qd2mora.objectives.grpo import in_deviations
from qd2mora.routed.gate import Gate
from qd2mora.training.estimator import Estimator, backward_over_draws, leave_one_out


def test_advantages_sum_to_zero_and_stretch_the_distance_from_the_mean() -> None:
    losses = torch.randn(5, 3, dtype=torch.float64)
    advantages = leave_one_out(losses)
    torch.testing.assert_close(advantages.sum(0), torch.zeros(3, dtype=torch.float64))
    for draw in range(5):
        others = torch.cat([losses[:draw], losses[draw + 1 :]]).mean(0)
        torch.testing.assert_close(advantages[draw], losses[draw] - others)


def test_advantages_in_deviations_have_mean_zero_and_deviation_one_and_equal_draws_teach_nothing() -> None:
    losses = torch.randn(5, 3, dtype=torch.float64)
    advantages = in_deviations(losses)
    torch.testing.assert_close(advantages.mean(0), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(advantages.std(0), torch.ones(3, dtype=torch.float64), rtol=1e-3, atol=0)
    torch.testing.assert_close(in_deviations(7 * losses + 2), advantages, rtol=1e-3, atol=1e-3)
    assert not in_deviations(torch.full((4, 2), 3.0)).any()


THREE = {"experts": 3}


def made(**settings: object) -> tuple[MixtureLinear, Tensor, Tensor]:
    torch.manual_seed(0)
    config = MixtureConfig(method="remix", rank=2, alpha=2, down=THREE, up=THREE, **settings)
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


def log_chance(scores: Tensor, order: list[int]) -> Tensor:
    """Return log P of experts drawn one after another, by the definition: the softmax over what is left, each time."""
    left, total = list(range(len(scores))), torch.zeros((), dtype=scores.dtype)
    for expert in order:
        total = total + scores[expert] - torch.log(sum(scores[other].exp() for other in left))
        left.remove(expert)
    return total


def judged_by_hand(estimator: str, values: list[float], number: int) -> float:
    rest = [value for place, value in enumerate(values) if place != number]
    if estimator == "rloo":
        return values[number] - sum(rest) / len(rest)
    mean = sum(values) / len(values)
    deviation = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return (values[number] - mean) / (deviation + 1e-4)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("estimator", "draws"), [("rloo", 2), ("rloo", 3), ("rloo", 7), ("grpo", 2), ("grpo", 5)])
def test_a_step_runs_the_model_twice_a_draw_and_its_gradient_is_that_of_every_draw_by_hand(
    estimator: Estimator, draws: int, guided: bool
) -> None:
    """Two rows of two tokens, drawn by scores with and without a guiding bias, against a loop in float64."""
    layer, x, goal = made(gates={"down": {"guidance": 1.0}} if guided else {})
    t = layer.tensors("default")
    bias = torch.tensor([0.5, -1.0, 0.2]).double() if guided else torch.zeros(3).double()
    if guided:
        t["mixture_select_bias_down"].data.copy_(bias)
    layer, x, goal = layer.double(), torch.randn(2, 2, 4).double(), torch.randn(2, 2, 3).double()
    layer.routing.rows, layer.routing.lengths, layer.routing.share = (11, 12), (2, 2), (1.0, 0.5)
    losses: list[Tensor] = []

    def row_losses() -> Tensor:
        losses.append((layer(x) - goal).square().sum((1, 2)))
        return losses[-1]

    backward_over_draws(row_losses, Tensor.backward, layer.routing, 1 / 4, draws, estimator)
    assert len(losses) == 2 * draws
    router, total = layer.tensors("default")["mixture_router_down"], torch.zeros(3, 4, dtype=torch.float64)
    values = torch.stack(losses[:draws]).detach()
    for number in range(draws):
        keys = tuple(mixed(key, number) for key in (11, 12))
        noise = Routing(rows=keys, lengths=(2, 2)).draws(layer.layer_key).gumbel(torch.zeros(2, 2, 3).double(), 1001)
        for row in range(2):
            advantage = judged_by_hand(estimator, values[:, row].tolist(), number) / draws
            # rloo counts as the loss does; grpo by the row's half of the step's rows and its two tokens.
            advantage *= 1 / 4 if estimator == "rloo" else 0.5 / 2 / 2
            for place in range(2):
                copy = router.detach().clone().requires_grad_()
                scores = copy @ x[row, place] + bias
                order = (scores.detach() + noise[row, place]).topk(2).indices.tolist()
                total += advantage * torch.autograd.grad(log_chance(scores, order), copy)[0]
    torch.testing.assert_close(router.grad, total)


@pytest.mark.parametrize("weight", ["equal", "renorm"])
@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_a_router_learns_to_choose_the_one_expert_that_is_right(estimator: Estimator, weight: str) -> None:
    torch.manual_seed(0)
    layer, _, _ = made(gates={"down": {"top_k": 1, "weight": weight}})
    # A router without a bias finds the same expert for tokens that share a direction.
    t, x = layer.tensors("default"), torch.randn(8, 3, 4) + torch.tensor([6.0, 0, 0, 0])
    right = (layer.base_layer(x) + layer.scaling("default") * x @ t["mixture_A"][1].T @ t["mixture_B"][1].T).detach()
    router = t["mixture_router_down"]
    optimizer = torch.optim.Adam([router], lr=0.1)
    layer.routing.lengths = (3,) * 8
    for step in range(60):
        layer.routing.rows = tuple(mixed(step, row) for row in range(8))
        optimizer.zero_grad()
        backward_over_draws(
            lambda: (layer(x) - right).square().sum((1, 2)), Tensor.backward, layer.routing, 1 / 24, 4, estimator
        )
        optimizer.step()
    assert ((x @ router.T).softmax(-1)[..., 1] > 0.9).all()
    torch.testing.assert_close(layer.eval()(x), right)


def test_guidance_is_the_log_of_a_running_share_and_keeps_all_experts_in_reach() -> None:
    gate, bias = Gate(select="sample", top_k=1, guidance=0.5), torch.zeros(3, dtype=torch.float64)
    share, loads = [1 / 3] * 3, [[6, 2, 0], [1, 1, 0], [0, 8, 0]]
    for load in loads:
        bias = moved_bias(gate, bias, torch.tensor(load).double())
        share = [0.99 * old + 0.01 * new / sum(load) for old, new in zip(share, load, strict=True)]
        torch.testing.assert_close(bias, 0.5 * (3 * torch.tensor(share).double()).log())
    assert torch.equal(moved_bias(gate, bias, torch.zeros(3).double()), bias)
    for _ in range(2000):
        bias = moved_bias(gate, bias, torch.tensor([1.0, 0.0, 0.0]).double())
    torch.testing.assert_close(bias[1:].exp(), torch.full((2,), 0.01**0.5).double())
    assert bias[0] == pytest.approx(0.5 * torch.tensor(3 / 1.0).log().item(), rel=0.02)


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
