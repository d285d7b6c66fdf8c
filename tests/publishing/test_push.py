"""Pushing, up to where a network begins: what would go is whole, public in its names, holds no secret, and loads."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from qd2mora.base import load_base
from qd2mora.cli import main
from qd2mora.errors import DamagedFile, InputRefused
from qd2mora.merging import ExportOptions, merge
from qd2mora.publishing import Pushed, PushOptions, push
from qd2mora.recipe import load_recipe
from qd2mora.run_folder import open_run
from qd2mora.safekeeping.verification import verified
from qd2mora.training import train

NAME, BASE = "someone/words", "owner/tiny-base"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    tiny.save_base(folder / "base")
    (folder / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    tiny.save_tasks(folder / "data")
    text = tiny.recipe_text(folder / "base", folder / "data", folder / "run")
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    train(load_recipe(folder / "run.yaml", ("train.steps=2",)))
    scores = {"first": {"metric": "exact", "rows": 8, "score": 0.5, "interval": [0.22, 0.78], "loss": 1.5}}
    (folder / "run" / "scores.json").write_text(json.dumps({"base": scores, "adapter": scores}), encoding="utf-8")
    for to in ("lora", "hf"):
        merge(folder / "run", folder / to, ExportOptions(to=to, strategy="mean_gate"))
    return folder


def pushed(source: Path, out: Path, **more: object) -> Pushed:
    options = PushOptions(base=BASE, dry_run=True, out=out, **more)  # type: ignore[arg-type]
    return push(source, NAME, options, lambda line: None)


def test_a_run_goes_as_its_adapter_with_a_card_of_its_own_report(folder: Path, tmp_path: Path) -> None:
    found = pushed(folder / "run", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert (
        names == set(found.files) >= {"README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    )
    assert not names & {"recipe.yaml", "samples.json", "metrics.jsonl", "checkpoints"}
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"base_model: {BASE}\n" in card and 'license: "apache-2.0"\n' in card
    assert "Method: `d2mora`" in card and "Source of the method: " in card
    assert "| first | `first.jsonl`, not public | instruction |" in card
    assert "| first | exact | 50.0% (22.0% to 78.0%), 8 rows | 50.0% (22.0% to 78.0%), 8 rows |" in card
    assert "import qd2mora" in card and f'"{NAME}")' in card
    for path in (tmp_path / "out").iterdir():
        assert str(folder) not in path.read_bytes().decode("utf-8", "replace"), path.name
    assert [each.folder for each in verified(tmp_path / "out")] == [tmp_path / "out"]


def test_what_goes_loads_as_the_card_says(folder: Path, tmp_path: Path) -> None:
    ids = torch.arange(4, 24).view(2, 10)
    pushed(folder / "run", tmp_path / "adapter")
    opened = open_run(folder / "run")
    theirs = PeftModel.from_pretrained(load_base(opened.recipe.base), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert theirs(input_ids=ids).logits.equal(opened.model(input_ids=ids).logits)
    pushed(folder / "hf", tmp_path / "hf")
    for name in ("hf",):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        wanted = AutoModelForCausalLM.from_pretrained(folder / name)
        with torch.no_grad():
            assert model(input_ids=ids).logits.equal(wanted(input_ids=ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter")("red")["input_ids"]


def test_an_export_tells_what_it_keeps_and_with_run_how_it_was_trained(folder: Path, tmp_path: Path) -> None:
    pushed(folder / "lora", tmp_path / "alone")
    card = (tmp_path / "alone" / "README.md").read_text(encoding="utf-8")
    report = json.loads((folder / "lora" / "export_report.json").read_text(encoding="utf-8"))
    assert f"{report['loss']['merged']:.4f} (this)" in card and "Made by `mean_gate`" in card
    assert "How it was trained" not in card
    pushed(folder / "lora", tmp_path / "told", run=folder / "run")
    assert "How it was trained" in (tmp_path / "told" / "README.md").read_text(encoding="utf-8")
    config = json.loads((tmp_path / "told" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == BASE


def test_a_changed_bit_a_secret_and_a_base_without_a_name_stop_it(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="says nothing to others; give its name on the hub"):
        push(folder / "run", NAME, PushOptions(dry_run=True, out=tmp_path / "a"), lambda line: None)
    copied = shutil.copytree(folder / "lora", tmp_path / "lora")
    with (copied / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(DamagedFile):
        pushed(copied, tmp_path / "b")
    other = shutil.copytree(folder / "run", tmp_path / "run")
    text = (other / "recipe.yaml").read_text(encoding="utf-8")
    assert "name: first" in text
    secret = "hf_" + "abcdefghij" * 3
    scores = json.loads((other / "scores.json").read_text(encoding="utf-8"))
    (other / "scores.json").write_text(json.dumps({secret: scores["base"]}), encoding="utf-8")
    with pytest.raises(InputRefused, match=r"README.md holds a Hugging Face token; nothing was pushed"):
        pushed(other, tmp_path / "c")
    for name in ("a", "b", "c"):
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["words", "a/b/c", "/b", "a/", "a b/c", "../c", "a/..", "a/b--c", "https://x/y"])
def test_a_name_that_the_hub_would_not_take_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputRefused, match="OWNER/NAME"):
        push(folder / "run", name, PushOptions(base=BASE, dry_run=True, out=tmp_path / "out"), lambda line: None)


def test_what_is_neither_run_nor_export_is_refused(folder: Path, tmp_path: Path) -> None:
    for source in (folder / "base", folder / "data", folder / "nothing"):
        with pytest.raises(InputRefused, match="neither a run nor an export"):
            pushed(source, tmp_path / "out")


def test_without_a_network_it_is_one_line_and_nothing_is_left(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "none")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = ["qd2mora", "push", str(folder / "lora"), NAME, "--base", BASE, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit) as ended:
        main()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and line.startswith(f"error: '{NAME}' was not pushed")
    assert not list(tmp_path.iterdir())
    assert (folder / "lora" / "adapter_model.safetensors").is_file()
