"""Routing while it is learned, in a layer: uniform gates and soft ones at first, penalties that rise."""

from dataclasses import replace

import made as layers
import pytest
import reference_methods as twin
import torch
from reference import softmax
from torch import Tensor

from qd2mora.mixture.phases import PLAIN, Phase, Sparsity, gate_in
from qd2mora.routed.gate import Gate

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def phased(method: str, phase: Phase, **changes: object) -> tuple[Tensor, Tensor]:
    """Return a layer's update in training in a phase, and without one."""
    layer, x = layers.layer_of(method, **changes), layers.input_for(method)
    layer.train()
    layer.routing.rows, layer.routing.lengths = (1, 2, 3), (5, 5, 5)
    plain = layer(x) - layer.base_layer(x)
    layer.routing.phase = phase
    inside = layer(x) - layer.base_layer(x)
    layer.eval()
    # Training alone: what is evaluated is the configuration's.
    torch.testing.assert_close(layer(x) - layer.base_layer(x), plain, **EXACT)
    return inside, plain


HARD = {"select": "top_k", "top_k": 2, "weight": "straight_through", "omega": 0.5}
FIRST = [
    ("d2mora", {}, lambda t, x: sum(t["mixture_B"]) / 5 @ (sum(t["mixture_A"]) / 3 @ x)),
    ("loramoe", {}, lambda t, x: twin.paired(torch.full((4,), 0.25), t, x)),
    ("mola", {}, lambda t, x: twin.paired(torch.full((4,), 0.25), t, x)),
    ("mola", {"gates": {"down": {"weight": "softmax"}}}, lambda t, x: twin.paired(torch.full((4,), 0.125), t, x)),
    ("loramoe", {"gates": {"down": HARD}}, lambda t, x: twin.paired(torch.full((4,), 0.25), t, x)),
    ("llava_mole", {}, lambda t, x: twin.paired(torch.full((4,), 0.25), t, x)),
    ("smora", {}, lambda t, x: t["mixture_B"][0] @ (t["mixture_A"][0] @ x) * (2 / 5)),
    (
        "residual_cores",
        {},
        lambda t, x: (
            t["mixture_B"][0] @ ((torch.eye(3) + sum(t["mixture_core"]) / 4).T.double() @ t["mixture_A"][0] @ x)
        ),
    ),
]


@pytest.mark.parametrize(("method", "changes", "update"), FIRST, ids=lambda each: str(each)[:20])
def test_in_uniform_steps_all_experts_count_alike_and_as_much_as_they_will(method, changes, update) -> None:
    layer, x = layers.layer_of(method, **changes), layers.input_for(method)
    t = {name: tensor.detach() for name, tensor in layer.tensors("default").items()}
    inside, plain = phased(method, Phase(is_uniform=True), **changes)
    wanted = torch.stack([torch.stack([update(t, token) for token in row]) for row in x])
    torch.testing.assert_close(inside, layers.SCALING[method] * wanted, **EXACT)
    assert (inside - plain).norm() > 0.1


def test_soft_steps_divide_scores_by_more_and_their_gradient_is_that_of_the_softer_gate() -> None:
    layer, x = layers.layer_of("loramoe"), layers.input_for("loramoe")
    layer.train()
    layer.routing.phase = Phase(temperature=4.0)
    router = layer.tensors("default")["mixture_router_down"]
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), router)
    t = {name: tensor.detach().clone() for name, tensor in layer.tensors("default").items()}
    leaf = t["mixture_router_down"].requires_grad_()
    rows = [torch.stack([twin.paired(softmax(leaf @ token / 4), t, token) for token in row]) for row in x]
    wanted = layer.base_layer(x) + layers.SCALING["loramoe"] * torch.stack(rows)
    torch.testing.assert_close(y, wanted, **EXACT)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted.square().sum(), leaf)[0], **EXACT)


def test_penalties_count_by_the_phase() -> None:
    layer, x = layers.layer_of("loramoe", penalties={"entropy": 0.5}), layers.input_for("loramoe")
    layer.train()
    gradients = []
    for phase in (PLAIN, Phase(penalty=0.25), Phase(penalty=0.0)):
        layer.routing.phase = phase
        router = layer.tensors("default")["mixture_router_down"]
        gradients.append(torch.autograd.grad(layer(x).sum(), router)[0])
    torch.testing.assert_close(gradients[1] - gradients[2], 0.25 * (gradients[0] - gradients[2]), **EXACT)
    assert (gradients[0] - gradients[2]).norm() > 1e-4


def test_a_top_k_falls_from_many_experts_to_its_own_and_later_in_low_layers() -> None:
    gate = Gate(select="top_k", weight="renorm", top_k=2)
    used = [gate_in(gate, Phase(sparsity=Sparsity(8, step / 6)), 8).top_k for step in range(9)]
    assert used == [8, 7, 6, 5, 4, 3, 2, 2, 2]
    by_height = [gate_in(gate, Phase(sparsity=Sparsity(8, 1.0, 1.0)), 8, height).top_k for height in (0, 0.5, 1)]
    assert by_height == [8, 5, 2]
    # No more than there are, and what chooses by no top k stays as it is.
    assert gate_in(gate, Phase(sparsity=Sparsity(8, 0.0)), 4).top_k == 4
    assert gate_in(Gate(), Phase(sparsity=Sparsity(8, 0.0)), 4) == Gate()


@pytest.mark.parametrize(("layer_number", "experts"), [(0, 4), (1, 3), (2, 2)])
def test_a_layer_begins_with_as_many_experts_as_its_height_says(layer_number: int, experts: int) -> None:
    layer, x = layers.layer_of("mola"), layers.input_for("mola")
    spec = layer.mixture_spec["default"]
    place = replace(spec.place, key=f"model.layers.{layer_number}.mlp.gate_proj", num_layers=3)
    layer.mixture_spec["default"] = replace(spec, place=place)
    layer.train()
    layer.routing.phase = Phase(sparsity=Sparsity(4, 1.0, 1.0))
    t = {name: tensor.detach() for name, tensor in layer.tensors("default").items()}

    def update(token: Tensor) -> Tensor:
        gates = softmax(t["mixture_router_down"] @ token)
        gates[gates < gates.topk(experts).values[-1]] = 0
        return twin.paired(gates / gates.sum(), t, token)

    wanted = layers.SCALING["mola"] * torch.stack([torch.stack([update(token) for token in row]) for row in x])
    torch.testing.assert_close(layer(x) - layer.base_layer(x), wanted, **EXACT)
