"""The layer against outputs and gradients of the authors' own published layer."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qd2mora.mixture import MixtureConfig, MixtureLinear, Routing

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.safetensors"))
PARAMETERS = ("A", "B", "router_down", "router_up")


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_output_and_gradients_equal_the_published_layer(path: Path) -> None:
    with safe_open(path, "pt") as file:
        golden = {name: file.get_tensor(name) for name in file.keys()}
        meta = file.metadata()
    d_out, d_in = golden["weight"].shape
    linear = torch.nn.Linear(d_in, d_out, bias="bias" in golden)
    linear.load_state_dict({name: golden[name] for name in ("weight", "bias") if name in golden})
    down, up = ({"experts": len(golden[name])} for name in ("A", "B"))
    config = MixtureConfig(method="d2mora", rank=int(meta["r"]), alpha=float(meta["alpha"]), down=down, up=up)
    layer = MixtureLinear(linear, "default", config, Routing())
    leaves = layer.tensors("default")
    for name in PARAMETERS:
        leaves[f"mixture_{name}"].data.copy_(golden[name])
    x = golden["x"].clone().requires_grad_()
    y = layer(x)
    y.backward(golden["grad_out"])
    pairs = [(y.detach(), golden["y"]), (x.grad, golden["dx"])]
    pairs += [(leaves[f"mixture_{name}"].grad, golden[f"d{name}"]) for name in PARAMETERS]
    for ours, theirs in pairs:
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
