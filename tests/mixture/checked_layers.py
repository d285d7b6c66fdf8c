"""Layers of five methods, every tensor random, and the slow float64 twin that they are checked against."""

import reference
import torch
from torch import Tensor, nn

from qd2mora.base import dense_weight
from qd2mora.mixture import MixtureConfig, MixtureLinear, Routing

D_IN, D_OUT, RANK, TASKS = 13, 7, 3, 4
ALPHA = 5.0
COUNTS = {"d2mora": (3, 5), "lora": (1, 1), "hydralora": (1, 5), "moslora": (1, 1), "moelora": (4, 4)}
# alpha over the rank of one expert; MOELoRA's code divides by the rank of all four.
SCALING = dict.fromkeys(COUNTS, ALPHA / RANK) | {"moelora": ALPHA / (4 * RANK)}
BANKS = {"mixture_A": "mixture_router_down", "mixture_B": "mixture_router_up"}


def make_config(method: str, **changes: object) -> MixtureConfig:
    down, up = COUNTS[method]
    settings: dict[str, object] = {
        "method": method,
        "rank": RANK,
        "alpha": ALPHA,
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
    layer = MixtureLinear(linear, "default", make_config(method, **changes), Routing(task_index=torch.tensor([2, 0])))
    for tensor in layer.tensors("default").values():
        nn.init.normal_(tensor)
    return layer


def gradients(y: Tensor, dy: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(y, leaves, dy))


def reference_output(layer: MixtureLinear, x64: Tensor, copies: dict[str, Tensor], tasks: list[int]) -> Tensor:
    """Base plus update in float64 over the dequantised weight; x (..., D), the task of each row of its first axis."""
    linear = layer.get_base_layer()
    weight = dense_weight(linear).double()
    bias = torch.zeros(1) if linear.bias is None else linear.bias
    x_TD = x64.reshape(-1, x64.shape[-1])
    task_T = torch.tensor(tasks).repeat_interleave(len(x_TD) // len(tasks))
    method = layer.mixture_config["default"].method
    update = reference.delta(method, x_TD, copies, SCALING[method], task_T)
    return x64 @ weight.T + bias.double() + update.view(*x64.shape[:-1], -1)


def check_against_reference(layer: MixtureLinear, x: Tensor) -> None:
    """Output and the gradient of every tensor, of x where it asks for one, and of nothing else."""
    tensors = layer.tensors("default")
    y = layer(x)
    dy = torch.randn(y.shape)
    leaves = [*tensors.values(), *([x] if x.requires_grad else [])]
    ours = gradients(y, dy, leaves)
    x64 = x.detach().double().requires_grad_()
    copies = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    wanted = reference_output(layer, x64, copies, [2, 0])
    theirs = gradients(wanted, dy.double(), [*copies.values(), x64])
    assert y.shape == wanted.shape
    # float32 sums of a few dozen terms against float64.
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    for name, mine, other in zip([*tensors, "x"], ours, theirs, strict=False):
        assert other.norm() > 0, name
        assert (mine.double() - other).norm() <= 1e-5 * other.norm(), name
