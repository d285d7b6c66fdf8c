"""A run folder: where things lie in it, how it is written so that a kill never leaves half a file, how it is opened.

`recipe.yaml` (resolved), `manifest.json`, `adapter/` (PEFT's own layout), tokenizer files, `checkpoints/step-N/`,
`metrics.jsonl`, and after a merge `export/`.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from qd2mora.base import load_base, load_tokenizer
from qd2mora.errors import InputRefused
from qd2mora.recipe import Recipe, load_recipe
from qd2mora.redact import redacted
from qd2mora.untrusted import check_adapter


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"


@dataclass(frozen=True)
class OpenRun:
    """A trained run in memory: its recipe, the base with the adapter on it, and the tokenizer."""

    folder: RunFolder
    recipe: Recipe
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase


def is_run(path: str | Path) -> bool:
    """Tell whether a folder holds a run."""
    return (Path(path) / "recipe.yaml").is_file()


def read_recipe(path: str | Path) -> Recipe:
    """Return the resolved recipe of a run. Raises InputRefused where there is no run."""
    if not is_run(path):
        raise InputRefused(f"'{path}' is not a run folder: it holds no recipe.yaml")
    return load_recipe(RunFolder(Path(path)).recipe)


def open_run(path: str | Path, device: torch.device | None = None) -> OpenRun:
    """Load base, adapter and tokenizer of a run, in evaluation mode. Raises InputRefused."""
    folder = RunFolder(Path(path))
    recipe = read_recipe(path)
    if not (folder.adapter / "adapter_model.safetensors").is_file():
        raise InputRefused(f"'{path}' holds no finished adapter; continue it with `qd2mora train RECIPE --resume`")
    check_adapter(folder.adapter)
    model = PeftModel.from_pretrained(load_base(recipe.base, device), str(folder.adapter))
    return OpenRun(folder, recipe, model.eval(), load_tokenizer(str(path)))


def refuse_taken(path: Path, what: str) -> None:
    """Refuse an output folder that holds anything. Raises InputRefused."""
    if path.is_file():
        raise InputRefused(f"{what}: '{path}' is a file; name a new folder")
    if path.is_dir() and any(path.iterdir()):
        raise InputRefused(f"{what}: '{path}' is not empty; name a new folder")


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield a fresh folder beside `target`; it takes target's place in one rename when the block ends well.

    Whatever stood there stays whole until then; where the block fails, nothing is left behind.
    """
    stage = target.with_name(f".{target.name}.partial")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        yield stage
        for file in stage.rglob("*"):
            if file.is_file():
                sync(file)
        sync(stage)
        _swap(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file through a temporary name and a rename."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(redacted(text, named=False), encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, indented."""
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def sync(path: Path) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(stage: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    stage.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


__all__ = [
    "OpenRun",
    "RunFolder",
    "is_run",
    "open_run",
    "read_recipe",
    "refuse_taken",
    "staged_folder",
    "sync",
    "write_atomically",
    "write_json",
]
