"""Packed rows learn what padded rows learn: loss and gradient row by row, a whole run, and a run that was resumed."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from qd2mora.base import load_base
from qd2mora.data import MicroBatch, Pair, Row, packed
from qd2mora.errors import InputRefused
from qd2mora.memory.checkpointing import enable_checkpointing
from qd2mora.memory.loss import RowLoss
from qd2mora.mixture import MixtureConfig, add_adapter, routing_of
from qd2mora.recipe import Base, Recipe, load_recipe
from qd2mora.training import train


def rows() -> list[Row]:
    chance = np.random.default_rng(0)
    return [
        Row(0, chance.integers(4, 500, size, dtype=np.int32), masked, Pair("", ""))
        for size, masked in ((9, 3), (30, 11), (4, 0), (17, 16), (23, 8), (12, 2))
    ]


def losses_and_gradients(
    model: torch.nn.Module, batches: list[MicroBatch], loss: RowLoss
) -> tuple[dict[int, float], dict[str, Tensor]]:
    losses: dict[int, float] = {}
    routing = routing_of(model)
    assert routing is not None
    for batch in batches:
        routing.rows, routing.places = batch.keys, batch.places
        routing.lengths = tuple(len(row.ids) for row in batch.rows)
        found = loss(batch.collated(3))
        found.sum().backward()
        losses |= dict(zip(batch.keys, found.tolist(), strict=True))
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad(set_to_none=True)
    return losses, gradients


def batches_of(rows: list[Row], capacity: int | None, lines_at_once: int) -> list[MicroBatch]:
    lines = [[n] for n in range(len(rows))] if capacity is None else packed([len(row.ids) for row in rows], capacity)
    parts = [lines[start : start + lines_at_once] for start in range(0, len(lines), lines_at_once)]
    return [
        MicroBatch(
            [rows[n] for line in part for n in line],
            tuple(n for line in part for n in line),
            () if capacity is None else tuple(map(len, part)),
        )
        for part in parts
    ]


@pytest.mark.parametrize(
    ("method", "attention", "recomputed"),
    [
        ("d2mora", "eager", False),
        *((method, "sdpa", kept) for method in ("d2mora", "lora", "mixlora", "noisy_top_k") for kept in (False, True)),
    ],
)
def test_packed_rows_have_the_losses_and_gradients_of_padded_rows(
    made: Path, method: str, attention: str, recomputed: bool
) -> None:
    base = load_base(Base(model=str(made / "base"), quantization="none", compute_dtype="float32"))
    base.set_attn_implementation(attention)
    if recomputed:
        enable_checkpointing(base)
    targets = ["gate_proj", "up_proj", "down_proj"] if method == "mixlora" else ["q_proj", "v_proj", "down_proj"]
    config = MixtureConfig(method=method, rank=4, alpha=8, dropout=0.1, target_modules=targets)
    model = add_adapter(base, config, 0)
    for name, each in model.named_parameters():
        if each.requires_grad:
            chance = torch.Generator().manual_seed(len(name))
            each.data.normal_(0, 0.1, generator=chance)
    model.train()
    loss = RowLoss(model)
    wanted, gradients = losses_and_gradients(model, batches_of(rows(), None, 6), loss)
    # The balance penalty of some methods is a mean over a micro batch: it wants the same rows together.
    sizes = [(48, 9), (96, 9)] + ([] if config.routing_penalties else [(40, 2), (48, 1)])
    for capacity, lines_at_once in sizes:
        got, packed_gradients = losses_and_gradients(model, batches_of(rows(), capacity, lines_at_once), loss)
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        assert gradients.keys() == packed_gradients.keys()
        for name, gradient in gradients.items():
            # Sums in another order, in float32.
            assert (gradient - packed_gradients[name]).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_a_row_does_not_see_the_rows_beside_it(made: Path) -> None:
    base = load_base(Base(model=str(made / "base"), quantization="none", compute_dtype="float32"))
    model = add_adapter(base, MixtureConfig(rank=4, alpha=8, target_modules=["q_proj"], dropout=0.0), 0)
    model.eval()
    loss, first = RowLoss(model), rows()
    other = [Row(0, each.ids[::-1].copy(), each.masked, each.pair) if n == 1 else each for n, each in enumerate(first)]
    with torch.no_grad():
        (one,), (two,) = ([loss(batch.collated(3)) for batch in batches_of(each, 128, 1)] for each in (first, other))
    same = [number for number in range(6) if one[number] == two[number]]
    changed = next(place for place, n in enumerate(batches_of(first, 128, 1)[0].keys) if n == 1)
    assert same == [number for number in range(6) if number != changed]


def test_rows_are_not_packed_under_an_attention_that_is_bounded_by_lines_alone(made: Path) -> None:
    def whole_lines(*tensors: Any, **_: Any) -> Any:  # what flash attention does with more than one line
        _, query, key, value, _ = tensors
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2), None

    AttentionInterface.register("whole_lines", whole_lines)
    base = load_base(Base(model=str(made / "base"), quantization="none", compute_dtype="float32"))
    model = add_adapter(base, MixtureConfig(rank=4, alpha=8, target_modules=["q_proj"], dropout=0.0), 0)
    base.set_attn_implementation("whole_lines")
    loss = RowLoss(model)
    assert loss(batches_of(rows(), None, 6)[0].collated(3)).isfinite().all()
    with pytest.raises(InputRefused, match=r"data\.packing: attention 'whole_lines' may look from one row"):
        loss(batches_of(rows(), 48, 2)[0].collated(3))


def recipe(made: Path, output: Path, *overrides: str, method: str = "d2mora") -> Recipe:
    path = made / f"{output.parent.name}-{output.name}.yaml"
    path.write_text(tiny.recipe_text(made / "base", made / "data", output, method=method), encoding="utf-8")
    return load_recipe(path, ["train.micro_batch=2", "train.global_batch=8", *overrides])


def test_a_packed_run_learns_what_a_padded_run_learns_and_resumes_to_the_byte(made: Path, tmp_path: Path) -> None:
    train(recipe(made, tmp_path / "padded"))
    settings = recipe(made, tmp_path / "packed", "data.packing=true", "data.max_length=256")
    train(settings)
    found = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("padded", "packed")]
    for name, tensor in found[0].items():
        assert (tensor - found[1][name]).norm() <= 1e-3 * tensor.norm().clamp_min(1e-3), name
    shutil.rmtree(tmp_path / "packed" / "checkpoints" / "step-6")
    train(settings, resume=True)
    again = load_file(tmp_path / "packed" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in found[1].items())


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("moelora", "reads the task of each row"),
        ("llava_mole", "is taken row by row"),
        ("remix", "counts by whole rows"),
        ("lora_mixer", None),
        ("hydralora", None),
    ],
)
def test_a_method_that_reads_whole_rows_is_not_packed(
    made: Path, tmp_path: Path, method: str, words: str | None
) -> None:
    from qd2mora.training.recipe_checks import check_packing

    config = MixtureConfig.from_recipe(recipe(made, tmp_path / "run", method=method).adapter, 2)
    if words is None:
        check_packing(config)
        return
    with pytest.raises(InputRefused, match=rf"data\.packing: .*{method} {words}"):
        train(recipe(made, tmp_path / "run", "data.packing=true", method=method))
