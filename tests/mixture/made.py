"""Layers of every method for tests: small, odd sizes, every tensor random, in float64 unless a test says otherwise."""

import torch
from torch import Tensor, nn

from qd2mora.mixture import MixtureConfig, MixtureLinear, Routing
from qd2mora.mixture.presets import METHODS
from qd2mora.mixture.spec import Place

# PEFT's own implementation, and the one whose experts are whole MLPs, have tests of their own.
NAMES = tuple(name for name, row in METHODS.items() if row.backend == "ours" and row.placement != "mlp")
ROWS, TOKENS, D_IN, D_OUT, RANK, ALPHA, HIDDEN, WIDTH, TASKS = 3, 5, 13, 7, 3, 5.0, 9, 4, 3
FOUR = {"experts": 4}
CHANGES: dict[str, dict[str, object]] = {
    "d2mora": {"down": {"experts": 3}, "up": {"experts": 5}},
    "hydralora": {"up": {"experts": 5}},
    "smora": {"rank": 5, "gates": {"rank": {"top_k": 2}}},
    "mora": {"rank": 5, "gates": {"rank": {"top_k": 2}}},
    "flylora": {"rank": 5, "gates": {"rank": {"top_k": 2}}},
    "peam": {"num_tasks": TASKS},
    "moelora": {"num_tasks": TASKS},
    "sketchassist": {"num_tasks": TASKS},
    "ept": {"num_tasks": TASKS, "down": {"experts": 8}, "up": {"experts": 8}},
    "reclora": {"external_width": WIDTH},
}
SCALING = dict.fromkeys(NAMES, ALPHA / RANK)
SCALING |= dict.fromkeys(("mora", "flylora"), ALPHA / 5) | {
    "smora": ALPHA / 2,
    "moelora": ALPHA / (4 * RANK),
}


def size_of(method: str) -> tuple[int, int]:
    """Return d_in, d_out: odd, and one width around a block."""
    return {"noisy_top_k": (D_IN, D_IN)}.get(method, (D_IN, D_OUT))


def config_of(method: str, **changes: object) -> MixtureConfig:
    """The method without penalties, which add to gradients in training and have tests of their own."""
    quiet = {penalty.kind: 0.0 for penalty in METHODS[method].penalties}
    settings: dict[str, object] = {"method": method, "rank": RANK, "alpha": ALPHA, "penalties": quiet}
    if METHODS[method].pairing == "tied" and METHODS[method].down > 1:
        settings |= {"down": FOUR, "up": FOUR}
    return MixtureConfig(**(settings | CHANGES.get(method, {}) | changes))


def routing_for_rows() -> Routing:
    """All that any router may ask of the rows."""
    generator = torch.Generator().manual_seed(5)
    return Routing(
        task_index=torch.tensor([2, 0, 1]),
        marks=torch.tensor([[0, 1, 1, 0, 2], [3, 3, 0, 4, 4], [0, 0, 0, 0, 1]]),
        group=torch.tensor([0, 1, 1]),
        external=torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64),
        prompt=torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool(),
        hidden=torch.randn(ROWS, TOKENS, HIDDEN, generator=generator, dtype=torch.float64),
    )


def base_of(method: str) -> nn.Module:
    d_in, d_out = size_of(method)
    torch.manual_seed(1)
    linear = nn.Linear(d_in, d_out)
    return nn.Sequential(linear, nn.Tanh()) if METHODS[method].placement == "block" else linear


def layer_of(
    method: str,
    routing: Routing | None = None,
    base: nn.Module | None = None,
    key: str = "model.layers.0.mlp.gate_proj",
    owns: bool = True,
    **changes: object,
) -> MixtureLinear:
    """A layer in evaluation mode whose every tensor is random, so that routing matters."""
    d_in, d_out = size_of(method)
    place = Place(key, d_in, d_out, 1, HIDDEN, owns)
    base = (base or base_of(method)).requires_grad_(False)
    layer = MixtureLinear(base, "default", config_of(method, **changes), routing or routing_for_rows(), place)
    torch.manual_seed(2)
    for tensor in layer.tensors("default").values():
        nn.init.normal_(tensor, std=0.5)
    return layer.double().eval()


def input_for(method: str, rows: int = ROWS, tokens: int = TOKENS) -> Tensor:
    return torch.randn(
        rows, tokens, size_of(method)[0], generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )


def trained(layer: MixtureLinear) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in layer.tensors("default").items() if tensor.requires_grad}
