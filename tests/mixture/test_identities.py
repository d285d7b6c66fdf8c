"""Balance losses, entropies and chance against their definitions: minima, limits, and what samplers promise."""

import itertools
import math

import made
import pytest
import reference
import reference_gates as gates
import torch
from torch import Tensor

from qd2mora.mixture.balance import PENALTIES, View, view
from qd2mora.mixture.draws import Draws, Rows
from qd2mora.mixture.method import Penalty
from qd2mora.mixture.penalties import pairwise_overlap, subspace_overlap, task_contrast
from qd2mora.routed.gate import Gate
from qd2mora.routed.routers import Gating, decide, log_probability, tsallis_entropy
from qd2mora.training.estimator import leave_one_out

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def seen(gate: Gate, logits_BTE: Tensor, counted: Tensor | None = None, by_row: bool = False, **ids: Tensor) -> View:
    counted = torch.ones(logits_BTE.shape[:2]) if counted is None else counted
    return view(decide(gate, logits_BTE), counted, by_row, ids.get("group"), ids.get("task"))


def value(kind: str, routed: View, **fields: float) -> Tensor:
    return PENALTIES[kind](routed, Penalty(kind, 1.0, **fields))


def random_logits(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_losses_are_least_at_balance_and_know_no_balance_once_gates_are_equal(k: int) -> None:
    """Mixtral's is k there and MoLA's 1, and so they are for any load as long as the gates are all equal."""
    top = Gate(select="top_k", top_k=k)
    balanced = torch.eye(4, dtype=torch.float64).roll(0, 0) * 50 + torch.arange(4) * 0.0
    balanced = torch.stack([balanced[torch.arange(4) - shift].sum(0) for shift in range(4)]) if k == 4 else balanced
    if k == 2:
        balanced = balanced + balanced.roll(1, 1)
    routed = seen(top, balanced.unsqueeze(0))
    torch.testing.assert_close(value("lb_mixtral", routed), torch.tensor([float(k)], dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(value("lb_mola", routed), torch.ones(1, dtype=torch.float64), **CLOSE)
    skewed = torch.tensor([[9.0, 8.0, 7.0, 6.0]], dtype=torch.float64).expand(5, 4).unsqueeze(0)
    if k < 4:
        assert value("lb_mixtral", seen(top, skewed)) > k and value("lb_mola", seen(top, skewed)) > 1
    quarter = torch.full((1, 5, 4), 0.25, dtype=torch.float64)
    equal = view(Gating(quarter, quarter, skewed, decide(top, skewed).chosen), torch.ones(1, 5), False, None, None)
    torch.testing.assert_close(value("lb_mixtral", equal), torch.tensor([float(k)], dtype=torch.float64), **CLOSE)


BY_HAND = ("lb_mixtral", "lb_mola", "lb_llava", "lb_soft", "lb_share", "z_loss", "entropy", "negative_entropy")
PADDED = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])


def by_hand(kind: str, probs: Tensor, used: Tensor, logits: Tensor) -> float:
    """One group of tokens (n, E), token by token."""
    num, E = probs.shape
    p = [float(probs[:, e].sum()) / num for e in range(E)]
    f = [float(used[:, e].sum()) / num for e in range(E)]
    if kind == "lb_mixtral":
        return E * sum(a * b for a, b in zip(f, p, strict=True))
    if kind == "lb_mola":
        return E * sum(a / sum(f) * b for a, b in zip(f, p, strict=True))
    if kind == "lb_share":
        return sum(a / sum(f) * b for a, b in zip(f, p, strict=True))
    if kind == "negative_entropy":
        return sum(each * math.log(each + 1e-5) for row in probs.tolist() for each in row) / num
    if kind == "lb_llava":
        return sum(a * b for a, b in zip(f, p, strict=True))
    if kind == "lb_soft":
        return E * sum(float((probs[:, e] * used[:, e]).sum()) / num * p[e] for e in range(E))
    if kind == "z_loss":
        return sum(math.log(sum(math.exp(each) for each in row.tolist())) ** 2 for row in logits) / num
    assert kind == "entropy"
    return sum(gates.tsallis(row, 1.1) for row in probs) / num


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("kind", BY_HAND)
def test_a_penalty_equals_its_formula_over_the_tokens_that_are_there(kind: str, by_row: bool) -> None:
    logits = random_logits(3, 5, 4)
    gate = Gate(select="top_k", top_k=2)
    ours = value(kind, seen(gate, logits, PADDED, by_row))
    decided = decide(gate, logits)
    wanted = []
    for rows in [[row] for row in range(3)] if by_row else [[0, 1, 2]]:
        pick = torch.cat([torch.tensor([[b, t] for t in range(5) if PADDED[b, t]]) for b in rows])
        parts = (tensor[pick[:, 0], pick[:, 1]] for tensor in (decided.probs, decided.used, logits))
        wanted.append(by_hand(kind, *parts))
    torch.testing.assert_close(ours, torch.tensor(wanted, dtype=torch.float64), **CLOSE)
    padded = torch.where(PADDED.bool().unsqueeze(-1), logits, 100 * logits.flip(-1))
    torch.testing.assert_close(value(kind, seen(gate, padded, PADDED, by_row)), ours, **CLOSE)


@pytest.mark.parametrize("shape", [(4,), (3, 1, 4)], ids=["static", "of rows"])
def test_gates_of_a_whole_row_count_once_a_row(shape: tuple[int, ...]) -> None:
    logits = random_logits(*shape)
    routed = (
        seen(Gate(), logits, PADDED) if len(shape) == 3 else view(decide(Gate(), logits), PADDED, False, None, None)
    )
    each = logits.view(-1, 4).expand(3, 4)
    wanted = sum(gates.tsallis(reference.softmax(row), 1.1) for row in each) / 3
    assert routed.is_of_rows and float(value("entropy", routed)) == pytest.approx(wanted, rel=1e-9)


def test_localised_balance_is_the_plain_one_at_delta_zero_and_nothing_where_weighed_loads_are_equal() -> None:
    logits, group = random_logits(3, 5, 4), torch.tensor([1, 0, 1])
    routed = seen(Gate(), logits, PADDED, True, group=group)
    loads = torch.stack([sum(reference.softmax(logits[b, t]) for t in range(5) if PADDED[b, t]) for b in range(3)])
    for delta in (0.0, 0.3):
        weighed = loads.clone()
        for b in range(3):
            for e in range(4):
                weighed[b, e] *= 1 + delta if (e < 2) == bool(group[b]) else 1 - delta
        spread = weighed - weighed.mean()
        wanted = spread.square().sum() / 11 / (weighed.mean().square() + 1e-10)
        torch.testing.assert_close(value("localized_balance", routed, delta=delta)[0], wanted, **CLOSE)
    # Gates of rows of group 1 lean to experts 2 and 3 exactly as the weighing leans to 0 and 1.
    lean = torch.tensor([0.7, 0.7, 1.3, 1.3], dtype=torch.float64).log()
    even = torch.stack([lean, lean.flip(0), lean]).unsqueeze(1)
    balanced = seen(Gate(), even, torch.ones(3, 1), True, group=group)
    torch.testing.assert_close(
        value("localized_balance", balanced, delta=0.3)[0], torch.zeros(()).double(), atol=1e-6, rtol=0
    )
    assert value("localized_balance", balanced, delta=0.0)[0] > 0.05


def test_cross_entropy_teaches_the_number_of_the_task() -> None:
    logits, task = random_logits(3, 5, 4), torch.tensor([3, 0, 2])
    routed = seen(Gate(), logits, PADDED, task=task)
    terms = [
        -math.log(float(reference.softmax(logits[b, t])[task[b]])) for b in range(3) for t in range(5) if PADDED[b, t]
    ]
    assert float(value("router_ce", routed)) == pytest.approx(sum(terms) / len(terms), rel=1e-9)


@pytest.mark.parametrize("order", [0.5, 1.0, 1.1, 2.0])
def test_entropy_is_one_at_equal_gates_nothing_at_one_and_continuous_in_its_order(order: float) -> None:
    probs = torch.softmax(random_logits(6, 5), -1)
    ours = tsallis_entropy(probs, order)
    torch.testing.assert_close(
        ours, torch.tensor([gates.tsallis(row, order) for row in probs], dtype=torch.float64), **CLOSE
    )
    # eps = 1e-5 stands inside the power, as published: E eps / |q - 1| at q > 1, its root an expert at q = 0.5.
    bound = {"rtol": 0, "atol": 2e-2 if order < 1 else 1e-3}
    torch.testing.assert_close(tsallis_entropy(torch.full((5,), 0.2).double(), order), torch.ones(()).double(), **bound)
    torch.testing.assert_close(tsallis_entropy(torch.eye(5).double()[0], order), torch.zeros(()).double(), **bound)
    near, shannon = tsallis_entropy(probs, 1.02), tsallis_entropy(probs, 1.0)
    torch.testing.assert_close(near, shannon, rtol=0, atol=1e-2)


@pytest.mark.parametrize("limit", [1.0, 0.0])
def test_dense_fallback_is_off_at_limit_one_and_always_on_at_zero(limit: float) -> None:
    gate = Gate(select="entropy", top_k=2, top_p=0.3, entropy_limit=limit)
    logits = torch.cat([random_logits(50, 6), torch.zeros(1, 6, dtype=torch.float64)])
    used = decide(gate, logits).used
    assert (used.sum(-1) == (2 if limit else 6)).all()
    # The last token's gates are all equal, so any two are its largest.
    assert (used[:-1].gather(-1, logits[:-1].topk(2, -1).indices) == 1).all()


def test_every_order_of_a_draw_without_replacement_has_its_plackett_luce_probability() -> None:
    logits = torch.tensor([0.7, -0.4, 0.2], dtype=torch.float64)
    for k in (1, 2, 3):
        total = 0.0
        for order in itertools.permutations(range(3), k):
            chosen = torch.zeros(3).double().scatter(0, torch.tensor(order), 1.0)
            ours = log_probability(Gating(chosen, chosen, logits, chosen, torch.tensor(order), logits)).exp()
            left, wanted = list(range(3)), 1.0
            for pick in order:
                wanted *= math.exp(logits[pick]) / sum(math.exp(logits[e]) for e in left)
                left.remove(pick)
            assert float(ours) == pytest.approx(wanted, rel=1e-12)
            total += wanted
        assert total == pytest.approx(1, rel=1e-12)


def test_drawn_orders_come_as_often_as_their_probability_says() -> None:
    num, gate = 60_000, Gate(select="sample", top_k=2, weight="uniform", temperature=1.3)
    logits = torch.tensor([0.7, -0.4, 0.2], dtype=torch.float64).expand(1, num, 3)
    drawn = decide(gate, logits, noise=Draws(Rows((3,))).gumbel(logits, 1))
    assert drawn.order is not None and (drawn.weight.sum(-1) == 2).all()
    codes = (drawn.order[0, :, 0] * 3 + drawn.order[0, :, 1]).bincount(minlength=9)
    seen_once = {int(code): place for place, code in enumerate(drawn.order[0, :, 0] * 3 + drawn.order[0, :, 1])}
    logs = log_probability(drawn, 1.3)[0]
    assert len(seen_once) == 6
    for code, place in seen_once.items():
        p = float(logs[place].exp())
        # five deviations of a frequency of 60,000 draws
        assert abs(int(codes[code]) / num - p) < 5 * (p * (1 - p) / num) ** 0.5


@pytest.mark.parametrize("k", [2, 3])
def test_the_gradient_of_a_draws_probability_is_finite_and_right(k: int) -> None:
    order = torch.tensor([2, 0, 1][:k])
    chosen = torch.zeros(3).double().scatter(0, order, 1.0)

    def run(logits: Tensor) -> Tensor:
        return log_probability(Gating(chosen, chosen, logits, chosen, order, logits), 0.7)

    assert torch.autograd.gradcheck(run, torch.tensor([0.3, -0.2, 0.9]).double().requires_grad_())


def test_leave_one_out_gradients_are_those_of_the_expected_loss() -> None:
    """All n-tuples of draws of a two-expert router, weighed by their probability, against the exact gradient."""
    losses = torch.tensor([1.7, -0.4], dtype=torch.float64)
    logits = torch.tensor([0.3, -0.5], dtype=torch.float64, requires_grad=True)
    probs = logits.softmax(0)
    (exact,) = torch.autograd.grad((probs * losses).sum(), logits)
    total = torch.zeros(2, dtype=torch.float64)
    for draw in itertools.product(range(2), repeat=3):
        advantage = leave_one_out(losses[list(draw)].unsqueeze(-1))[:, 0]
        assert abs(float(advantage.sum())) < 1e-12
        probs = logits.softmax(0)
        surrogate = sum(a / 3 * probs[e].log() for a, e in zip(advantage, draw, strict=True))
        (gradient,) = torch.autograd.grad(surrogate, logits)
        total += gradient * math.prod(probs[list(draw)].tolist())
    torch.testing.assert_close(total, exact, **CLOSE)
    several = random_logits(4, 3)
    torch.testing.assert_close(leave_one_out(several), 4 / 3 * (several - several.mean(0)), **CLOSE)


def test_equal_experts_cost_their_number_of_pairs_and_orthogonal_ones_nothing() -> None:
    one = torch.randn(3, 8)
    assert float(pairwise_overlap([one.expand(4, 3, 8)])) == pytest.approx(6, rel=1e-4)
    far = torch.eye(12, 8)[:8].view(4, 2, 8)
    assert float(pairwise_overlap([far])) == 0
    near = torch.randn(3, 2, 8)
    assert float(pairwise_overlap([7 * near])) == pytest.approx(float(pairwise_overlap([near])), rel=1e-5)


def test_subspace_overlap_sees_what_the_flattened_cosine_cannot() -> None:
    """Rotating an expert's ranks leaves its span: the cosine changes, the overlap does not."""
    bank = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(2))
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(3)))[0]
    turned = bank.clone()
    turned[1] = turn @ bank[1]
    before, after = subspace_overlap([bank], 0), subspace_overlap([turned], 0)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)
    assert abs(float(pairwise_overlap([turned])) - float(pairwise_overlap([bank]))) > 1e-2
    torch.testing.assert_close(subspace_overlap([turned.mT], 1), before, rtol=1e-4, atol=1e-6)
    hidden = torch.stack([torch.eye(2, 5), torch.eye(2, 5).flip(0)])
    assert float(pairwise_overlap([hidden])) == 0 and float(subspace_overlap([hidden], 0)) == pytest.approx(
        0.5, rel=1e-4
    )


def test_contrast_is_the_log_of_the_number_of_tasks_for_equal_embeddings_and_falls_as_they_part() -> None:
    equal = torch.cat([torch.ones(4, 6), torch.randn(1, 6)])
    assert float(task_contrast([equal])) == pytest.approx(math.log(4), rel=1e-5)
    apart = torch.cat([torch.eye(4, 6), torch.randn(1, 6)])
    assert float(task_contrast([apart])) < 1e-3


@pytest.mark.parametrize("weight", ["renorm", "straight_through", "softmax", "one"])
def test_experts_that_a_bias_brings_in_have_finite_gradients_however_unlikely(weight: str) -> None:
    logits = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    chosen = decide(Gate(select="top_k", top_k=1, weight=weight), logits, bias=torch.tensor([0.0, 0.0, 1e4]))
    assert chosen.used.tolist() == [[0.0, 0.0, 1.0]]
    (gradient,) = torch.autograd.grad(chosen.weight.sum() + 0 * logits.sum(), logits)
    assert torch.isfinite(gradient).all()


def test_penalties_reach_the_router_by_the_micro_batchs_share_and_the_losses_scale() -> None:
    x = made.input_for("mola")
    gradients = []
    for share, scale in (((1.0, 1.0), 1.0), ((0.25, 1.0), 8.0)):
        layer = made.layer_of("mola", penalties={"lb_mola": 0.5}).train()
        layer.routing.share, layer.routing.loss_scale = share, scale
        (layer(x) * 0).sum().backward()
        gradients.append(layer.tensors("default")["mixture_router_down"].grad)
        # What is told of the loss carries the share, not the scale.
        gradients.append(layer.routing.take_values()["lb_mola"])
    assert gradients[0].any()
    torch.testing.assert_close(gradients[2], 2 * gradients[0])
    assert gradients[3] == pytest.approx(gradients[1] / 4)
