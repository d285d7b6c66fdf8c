"""Recipes and bases for tests of the plan."""

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from qd2mora.base import Shape, base_config, random_base
from qd2mora.memory.checkpointing import recompute_layers
from qd2mora.memory.lean import make_lean
from qd2mora.memory.ledger import Ledger, ledger
from qd2mora.memory.shapes import Shapes, read_shapes
from qd2mora.memory.techniques import Layout
from qd2mora.mixture import MixtureConfig, add_adapter
from qd2mora.recipe import Base, Recipe, parse_recipe

QKV = ["q_proj", "k_proj", "v_proj"]
PAPER = {"rank": 16, "alpha": 32.0, "targets": QKV, "down": {"experts": 4}, "up": {"experts": 3}}
CPU = torch.device("cpu")


def recipe_of(model: str = "random:tiny", max_length: int = 256, **sections: dict[str, Any]) -> Recipe:
    """Return a recipe over one task; `sections` add to those of the recipe."""
    content: dict[str, Any] = {
        "base": {"model": model, **sections.pop("base", {})},
        "adapter": sections.pop("adapter", PAPER),
        "data": {"tasks": [{"name": "one", "path": "one.jsonl"}], "max_length": max_length},
        "train": {"steps": 1, **sections.pop("train", {})},
        "output": "run",
        **sections,
    }
    return parse_recipe(content)


def adapter_of(recipe: Recipe) -> MixtureConfig:
    return MixtureConfig.from_recipe(recipe.adapter, len(recipe.data.tasks))


def shapes_of(recipe: Recipe) -> Shapes:
    return read_shapes(base_config(recipe.base), adapter_of(recipe))


def cpu_ledger(
    shape: Shape, recipe: Recipe, micro_batch: int, recomputed: int | bool, dtype: torch.dtype, **setting: Any
) -> Ledger:
    """Return the ledger of a CPU; `recomputed` True: every layer."""
    number = recomputed * shape.layers if isinstance(recomputed, bool) else recomputed
    shapes = read_shapes(shape.config(), adapter_of(recipe))
    setting = {"on_gpu": False, "optimizer": recipe.train.optimizer, **setting}
    return ledger(shapes, recipe, Layout(micro_batch, number, dtype, **setting))


def adapted(
    shape: Shape,
    recipe: Recipe,
    dtype: str = "float32",
    recomputed: int | bool = False,
    prepare: Callable[[PreTrainedModel], None] = lambda base: None,
) -> PeftModel:
    """Return a real model of random weights with the recipe's adapter, ready to train; `prepare` is given its base."""
    base = random_base(shape, Base(model="random:tiny", compute_dtype=dtype), CPU)
    prepare(base)
    make_lean(base)
    recompute_layers(base, recomputed * shape.layers if isinstance(recomputed, bool) else recomputed, False, CPU)
    model = add_adapter(base, adapter_of(recipe), seed=0)
    model.train()
    return model


def padded_batch(rows: int, length: int, vocab: int) -> dict[str, Tensor]:
    """Return rows of random tokens, the first a little shorter, every token labelled."""
    ids = torch.randint(1, vocab, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    task_index = torch.zeros(rows, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone(), "task_index": task_index}
