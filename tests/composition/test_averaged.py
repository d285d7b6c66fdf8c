"""FlyLoRA's merge: adapters of one frozen A are averaged exactly, others are refused."""

from pathlib import Path

import pytest
import tiny
import torch
from exported import ALL
from peft import PeftModel
from torch import Tensor, nn

from qd2mora.base import load_base
from qd2mora.composition import ComposeOptions, compose
from qd2mora.errors import InputRefused
from qd2mora.mixture import MixtureConfig, add_adapter
from qd2mora.recipe import Base

IDS = torch.arange(4, 24).view(2, 10)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("averaged") / "base", tied=False)


def trained(base: Path, *, seed: int = 0, draw: int = 0, bias: float = 0.0, **changes: object) -> PeftModel:
    """A FlyLoRA that started at `seed`, with B as training on rows of its own might leave it."""
    settings: dict[str, object] = {"method": "flylora", "rank": 8, "gates": {"rank": {"top_k": 3}}}
    config = MixtureConfig(target_modules=ALL, task_type="CAUSAL_LM", **(settings | changes))
    model = add_adapter(load_base(Base(model=str(base), quantization="none")), config, seed)
    torch.manual_seed(draw)
    for name, tensor in model.named_parameters():
        if "mixture_B" in name:
            nn.init.normal_(tensor, std=0.2)
        if "select_bias" in name and bias:
            nn.init.normal_(tensor, std=bias)
    return model.eval()


def saved(model: PeftModel, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def updates(folder: str | Path, base: Path, x: Tensor) -> Tensor:
    """What the adapter of one linear adds to its output."""
    model = PeftModel.from_pretrained(load_base(Base(model=str(base), quantization="none")), str(folder)).eval()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        return layer(x) - layer.base_layer(x)


def test_the_average_of_adapters_is_the_average_of_what_they_add(base: Path, tmp_path: Path) -> None:
    folders = [saved(trained(base, draw=draw), tmp_path / str(draw)) for draw in (1, 2, 3)]
    done = compose("average", folders, tmp_path / "out", ComposeOptions(weights="0.5,0.3,-0.4"))
    assert done.words == "adapters of one frozen A: 3, exact"
    x = torch.randn(2, 5, 64)
    weighed = zip((0.5, 0.3, -0.4), folders, strict=True)
    wanted = torch.stack([weight * updates(folder, base, x) for weight, folder in weighed]).sum(0)
    torch.testing.assert_close(updates(tmp_path / "out", base, x), wanted, atol=1e-5, rtol=1e-4)
    assert float(wanted.abs().max()) > 0.1


def test_selection_biases_that_moved_apart_are_averaged_and_said(base: Path, tmp_path: Path) -> None:
    folders = [saved(trained(base, draw=draw, bias=0.1), tmp_path / str(draw)) for draw in (1, 2)]
    assert "their selection biases differ by up to" in compose("average", folders, tmp_path / "out").words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "is not that of .*; train both with one train.seed"),
        ({"alpha": 3.0}, "adapter.alpha is 64.0 in .* and 3.0 in"),
    ],
)
def test_adapters_without_one_frozen_a_are_refused(
    changes: dict[str, object], words: str, base: Path, tmp_path: Path
) -> None:
    folders = [saved(trained(base), tmp_path / "one"), saved(trained(base, **changes), tmp_path / "other")]
    with pytest.raises(InputRefused, match=words):
        compose("average", folders, tmp_path / "out")


def test_an_a_that_was_trained_is_refused(base: Path, tmp_path: Path) -> None:
    folder = saved(trained(base, method="d2mora", gates=None), tmp_path / "one")
    with pytest.raises(InputRefused, match="average: d2mora trains its A"):
        compose("average", [folder, folder], tmp_path / "out")
