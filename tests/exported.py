"""Models with random adapters, so that routing matters, made without training; and a child that cannot import us."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import tiny
import torch
from peft import PeftModel
from torch import nn

from qd2mora.adapter_folder import base_identity, save_adapter
from qd2mora.base import load_base, load_tokenizer
from qd2mora.mixture import MixtureConfig, add_adapter
from qd2mora.recipe import Base, load_recipe

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def randomise(model: nn.Module) -> None:
    """Give every tensor of the adapter values as large as training may."""
    torch.manual_seed(0)
    for name, tensor in model.named_parameters():
        if "mixture_" in name:
            nn.init.normal_(tensor, std=0.1 if "mixture_B" in name else 0.3)


def adapted(base: Base, method: str, **changes: object) -> PeftModel:
    """Return the base with a random adapter of a method on all linears, in evaluation mode."""
    settings = {"rank": 4, "alpha": 8.0, "num_tasks": 2 if method == "sketchassist" else None, "target_modules": ALL}
    model = add_adapter(load_base(base), MixtureConfig(method=method, task_type="CAUSAL_LM", **(settings | changes)), 0)
    randomise(model)
    return model.eval()


def make_run(folder: Path, method: str, *, tied: bool = True, quantization: str = "nf4", adapter: str = "") -> Path:
    """Return a run folder of a method, on q_proj, v_proj and down_proj; `adapter` adds keys to its adapter section."""
    base = folder / "base"
    if not base.exists():
        tiny.save_base(base, tied=tied)
        tiny.save_tasks(folder / "data")
    run = folder / f"run-{method}-{quantization}"
    run.mkdir()
    text = tiny.recipe_text(base, folder / "data", run, method=method)
    text = text.replace(f"model: {base}", f"model: {base}, quantization: {quantization}")
    (run / "recipe.yaml").write_text(text.replace("rank: 4,", f"rank: 4, {adapter}"), encoding="utf-8")
    recipe = load_recipe(run / "recipe.yaml")
    model = add_adapter(load_base(recipe.base), MixtureConfig.from_recipe(recipe.adapter, 2), 0)
    randomise(model)
    save_adapter(model, run / "adapter", base_identity(recipe.base))
    load_tokenizer(recipe.base.model).save_pretrained(run)
    return run


def without_this_package(code: str) -> str:
    """Run code in a process where qd2mora cannot be imported; return what it printed."""
    blocked = f'import sys\nsys.modules["qd2mora"] = None\n{code}'
    with tempfile.TemporaryDirectory() as cache:  # of the folders' code files
        environment = os.environ | {"HF_MODULES_CACHE": cache}
        command = [sys.executable, "-c", blocked]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
