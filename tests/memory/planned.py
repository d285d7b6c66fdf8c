"""Recipes and bases for tests of the plan."""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from qd2mora.base import Shape, base_config, enable_checkpointing, random_base
from qd2mora.memory.ledger import Ledger, Setting, Shapes, ledger, read_shapes
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


def cpu_ledger(shape: Shape, recipe: Recipe, micro_batch: int, checkpointing: bool, dtype: torch.dtype) -> Ledger:
    shapes = read_shapes(shape.config(), adapter_of(recipe))
    return ledger(shapes, recipe, Setting(micro_batch, checkpointing, dtype, on_gpu=False))


def adapted(shape: Shape, recipe: Recipe, dtype: str = "float32", checkpointing: bool = False) -> PeftModel:
    """Return a real model of random weights with the recipe's adapter, ready to train."""
    base = random_base(shape, Base(model="random:tiny", compute_dtype=dtype), CPU)
    if checkpointing:
        enable_checkpointing(base)
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
