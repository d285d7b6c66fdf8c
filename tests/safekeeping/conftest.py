"""One tiny run with all that verbs add to it, and exports of it, for tests that damage copies of them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from qd2mora.cli.training_end import finish
from qd2mora.merging import ExportOptions, merge
from qd2mora.recipe import load_recipe
from qd2mora.training import train


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `base`, `data`, `run` and the exports `hf` and `lora`."""
    from rich.console import Console

    folder = tmp_path_factory.mktemp("kept")
    tiny.save_base(folder / "base")
    tiny.save_tasks(folder / "data")
    recipe = folder / "recipe.yaml"
    recipe.write_text(tiny.recipe_text(folder / "base", folder / "data", folder / "run"), encoding="utf-8")
    with open(os.devnull, "w") as nowhere:
        finish(train(load_recipe(recipe, ["train.steps=4", "finish.export=true"])).folder, Console(file=nowhere))
    merge(folder / "run", folder / "hf", ExportOptions(strategy="mean_gate"))
    merge(folder / "run", folder / "lora", ExportOptions(strategy="mean_gate", to="lora"))
    return folder


@pytest.fixture(autouse=True)
def _without_a_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
