"""Exports say what they are in the words of transformers 4 too, and read the same in transformers 5."""

import json
from pathlib import Path

import pytest
import tiny
from transformers import AutoConfig, AutoTokenizer

from qd2mora.merging import ExportOptions, merge
from qd2mora.recipe import load_recipe
from qd2mora.training import train

SCALED = {"rope_type": "linear", "factor": 4.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base as transformers 4 wrote it, a run on it, and its exports."""
    folder = tmp_path_factory.mktemp("older")
    tiny.save_base(folder / "base")
    config = json.loads((folder / "base/config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 500000.0, "rope_scaling": SCALED}
    (folder / "base/config.json").write_text(json.dumps(config), encoding="utf-8")
    tiny.save_tasks(folder / "data")
    path = folder / "recipe.yaml"
    path.write_text(tiny.recipe_text(folder / "base", folder / "data", folder / "run"), encoding="utf-8")
    train(load_recipe(path, ["train.steps=1"]))
    merge(folder / "run", folder / "exact", ExportOptions(to="exact", measured_rows=0))
    for to in ("hf", "lora"):
        merge(folder / "run", folder / to, ExportOptions(to=to, strategy="mean_gate", measured_rows=0))
    return folder


@pytest.mark.parametrize("to", ["hf", "exact"])
def test_both_spellings_of_positions_are_written_and_agree(to: str, folder: Path) -> None:
    content = json.loads((folder / to / "config.json").read_text())
    assert content["rope_theta"] == 500000.0 and content["rope_scaling"] == SCALED
    assert content["rope_parameters"] == SCALED | {"rope_theta": 500000.0}
    if to == "hf":
        assert AutoConfig.from_pretrained(folder / to).rope_parameters == content["rope_parameters"]


@pytest.mark.parametrize("to", ["run", "hf", "exact", "lora"])
def test_the_tokenizer_has_a_class_that_older_loaders_know_and_gives_the_same_ids(to: str, folder: Path) -> None:
    assert json.loads((folder / to / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )
    base, saved = AutoTokenizer.from_pretrained(folder / "base"), AutoTokenizer.from_pretrained(folder / to)
    assert saved("red sun\n moon")["input_ids"] == base("red sun\n moon")["input_ids"]
    assert saved.eos_token == base.eos_token and saved.pad_token == base.pad_token
