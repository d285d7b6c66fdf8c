"""The plan against known totals of a 7B and against the bytes of a model that is really there."""

from pathlib import Path

import pytest
import torch

from qd2mora.base import is_nf4, load_base
from qd2mora.errors import InputRefused
from qd2mora.memory import parse_size, plan
from qd2mora.recipe import Recipe, parse_recipe
from qd2mora.report import draw_plan

GIB = 1 << 30


def recipe(shape: str = "llama2-7b", **train: object) -> Recipe:
    return parse_recipe(
        {
            "base": {"model": f"random:{shape}"},
            "adapter": {"method": "d2mora"},
            "data": {"tasks": [{"name": "any", "path": "any.jsonl"}], "max_length": 256},
            "train": {"steps": 1} | train,
            "output": "runs/any",
        }
    )


def test_the_totals_of_a_7b_are_the_known_ones() -> None:
    planned = plan(recipe(optimizer="adamw"), budget="24GiB")
    items = planned.items
    assert (items["4-bit weights"] + items["quantisation state"]) / GIB == pytest.approx(3.112, rel=1e-3)
    assert items["embeddings"] == items["output head"] == 250 << 20
    assert planned.trainable_parameters == 45_617_664
    assert items["adapters"] == items["gradients"] == 4 * 45_617_664
    assert items["optimizer state"] == pytest.approx(8 * 45_617_664, rel=1e-4)


def test_frozen_bytes_are_those_of_the_real_model() -> None:
    planned = plan(recipe("tiny"), device=torch.device("cpu"))
    base = load_base(recipe("tiny").base)
    packed = sum(module.weight.nbytes for module in base.modules() if is_nf4(module))
    dense = sum(tensor.nbytes for tensor in base.parameters() if tensor.is_floating_point())
    items = planned.items
    assert items["4-bit weights"] == packed
    assert items["embeddings"] + items["output head"] + items["norms and biases"] == dense


def test_more_memory_never_gives_a_smaller_peak_than_it_allows_and_fits_where_it_says() -> None:
    peaks = [plan(recipe(), budget=size * GIB) for size in (1, 4, 6, 7, 8, 12, 16, 24)]
    for planned, size in zip(peaks, (1, 4, 6, 7, 8, 12, 16, 24), strict=True):
        assert planned.fits == (planned.peak_bytes <= size * GIB)
    assert not peaks[0].fits and len(peaks[0].ways_out) == 3
    assert all(planned.fits for planned in peaks[1:])
    assert peaks[-1].micro_batch >= peaks[2].micro_batch


def test_what_the_recipe_says_stays() -> None:
    assert plan(recipe(micro_batch=2), budget="24GiB").micro_batch == 2
    assert parse_size("1.5 GiB") == 1.5 * GIB
    with pytest.raises(InputRefused, match="8 apples"):
        parse_size("8 apples")


def test_a_plan_is_drawn_and_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    planned = plan(recipe("tiny"), budget="8GiB")
    draw_plan(planned, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputRefused, match=r"--png: .*name a \.png file"):
        draw_plan(planned, tmp_path / "plan.jpg")
