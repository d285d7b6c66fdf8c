"""The layer against outputs and gradients of the authors' own published layer."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qd2mora.mixture.ops import chain_delta

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))
NAMES = ("x", "A", "B", "router_down", "router_up")


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_output_and_gradients_equal_the_published_layer(path: Path) -> None:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        meta = file.metadata()
    leaves = {name: tensors[name].clone().requires_grad_() for name in NAMES}
    y = torch.nn.functional.linear(leaves["x"], tensors["weight"], tensors.get("bias"))
    y = y + chain_delta(*leaves.values(), float(meta["alpha"]) / int(meta["r"]))
    y.backward(tensors["grad_out"])
    pairs = [(y.detach(), tensors["y"])] + [(leaf.grad, tensors[f"d{name}"]) for name, leaf in leaves.items()]
    for ours, theirs in pairs:
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
