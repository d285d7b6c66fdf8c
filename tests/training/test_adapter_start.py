"""A run that goes on from an adapter: step 0 is that adapter to the bit; what does not fit is named."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from interrupted import stop_after
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qd2mora.cli import main
from qd2mora.composition import ComposeOptions, compose
from qd2mora.errors import InputRefused, SignalStop
from qd2mora.recipe import Recipe, load_recipe
from qd2mora.training import run as training_run
from qd2mora.training import train


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two tasks, a D2MoRA run, a LoRA of PEFT's, and what compose makes of that."""
    folder = tmp_path_factory.mktemp("start")
    tiny.save_base(folder / "base")
    tiny.save_tasks(folder / "data")
    train(recipe_of(folder, folder / "run", "method: d2mora, rank: 4, alpha: 8, targets: [q_proj, v_proj]"))
    torch.manual_seed(3)
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), lora)
    for name, tensor in plain.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.05)
    plain.save_pretrained(folder / "lora")
    compose("upcycle", [str(folder / "lora")], folder / "upcycled", ComposeOptions(experts=2))
    compose("upcycle", [str(folder / "lora")], folder / "four", ComposeOptions(experts=4))
    compose("sub", [str(folder / "four")], folder / "sub", ComposeOptions(experts=2))
    return folder


def recipe_of(folder: Path, output: Path, adapter: str) -> Recipe:
    text = tiny.recipe_text(folder / "base", folder / "data", output)
    start, end = text.index("adapter: {"), text.index("data:\n")
    path = output.with_suffix(".yaml")
    path.write_text(f"{text[:start]}adapter: {{{adapter}}}\n{text[end:]}", encoding="utf-8")
    return load_recipe(path)


def tensors_at_start(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Return the adapter as a run has it before its first step."""
    found: dict[str, Tensor] = {}

    def stop(start: Any, inputs: Any, model: Any, frozen: Any) -> None:
        found.update({name: tensor.detach().clone() for name, tensor in model.named_parameters() if "mixture_" in name})
        raise SignalStop("seen enough")

    monkeypatch.setattr(training_run, "_updater", stop)
    with pytest.raises(SignalStop):
        train(recipe)
    monkeypatch.undo()
    return {name.removeprefix("base_model.model.").replace(".default", ""): found[name] for name in found}


@pytest.mark.parametrize("start", ["run", "run/adapter", "lora", "upcycled", "sub"])
def test_a_run_begins_with_the_bits_of_what_it_goes_on_from(
    start: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made / start
    found = tensors_at_start(recipe_of(made, tmp_path / "next", f"start: {folder}"), monkeypatch)
    place = folder / "adapter" if (folder / "adapter").is_dir() else folder
    stored = {
        key.removeprefix("base_model.model."): each
        for key, each in load_file(next(place.glob("*.safetensors"))).items()
    }
    stored = {
        key.replace("lora_A.weight", "mixture_A").replace("lora_B.weight", "mixture_B"): each
        for key, each in stored.items()
    }
    assert found.keys() == stored.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.flatten(), stored[name].flatten()), name


@pytest.mark.parametrize("start", ["run", "lora", "upcycled", "sub"])
def test_it_trains_on_and_resumes_and_says_where_it_came_from(start: str, made: Path, tmp_path: Path) -> None:
    recipe = recipe_of(made, tmp_path / "next", f"start: {made / start}, dropout: 0.1")
    train(recipe)
    identity = json.loads((tmp_path / "next" / "manifest.json").read_text(encoding="utf-8"))["identity"]
    assert len(identity["adapter.start.weights"]) == 64 and identity["adapter.dropout"] == 0.1
    kept = load_recipe(tmp_path / "next" / "recipe.yaml")
    assert kept.adapter.method == {"run": "d2mora", "lora": "lora"}.get(start, "loramoe")
    assert train(recipe, resume=True).steps == 6
    assert train(kept, resume=True).steps == 6


def test_experts_are_added_and_the_old_ones_stay_bit_for_bit(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = f"start: {made / 'run'}, grow: 2"
    recipe = recipe_of(made, tmp_path / "next", adapter)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"weight_decay": 0.1})})
    train(recipe)
    old, new = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (made / "run", tmp_path / "next"))
    assert old.keys() == new.keys()
    for name, tensor in new.items():
        grown = len(tensor) - len(old[name])
        assert grown == (2 if "shared" not in name else 0), name
        assert torch.equal(tensor[: len(old[name])], old[name]), name
        if name.endswith("mixture_B"):
            assert bool(tensor[len(old[name]) :].abs().sum((1, 2)).all()), name
    broken = recipe_of(made, tmp_path / "broken", adapter)
    broken = broken.model_copy(update={"train": recipe.train})
    stop_after(3, monkeypatch)
    with pytest.raises(SignalStop):
        train(broken)
    monkeypatch.undo()
    train(broken, resume=True)
    resumed = load_file(tmp_path / "broken" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in new.items())


def test_a_table_says_what_each_earlier_task_lost(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "next.yaml"
    recipe_of(made, tmp_path / "next", f"start: {made / 'run'}")
    text = path.read_text(encoding="utf-8").replace("{name: last,", "{name: other,").replace("steps: 6", "steps: 2")
    path.write_text(f"{text}\nfinish: {{score: true, export: false}}\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["qd2mora", "train", str(path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "which this run went on from" in printed
    scores = json.loads((tmp_path / "next" / "earlier_tasks.json").read_text(encoding="utf-8"))
    assert set(scores) == {"before", "now"} and set(scores["now"]) == {"first", "last"}
    monkeypatch.setattr(sys, "argv", ["qd2mora", "verify", str(tmp_path / "next")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0


BAD = {
    "method: d2mora, grow: 2": "adapter.grow: goes with adapter.start",
    "start: {lora}, grow: 2": "adapter.grow: the experts of lora are not ones",
    "method: mola, start: {lora}": "adapter.method: mola, but .* is a lora; leave it out, or make a mixture",
    "rank: 8, start: {run}": "adapter.rank: 8, but .* has 4; leave it out",
    "targets: [q_proj], start: {run}": "adapter.targets",
    "start: {here}/nothing": "holds no adapter",
    "start: {here}/missing": "has no partner",
    "start: {here}/narrow": "another base",
    "start: {here}/nan": "is not finite",
    "start: {here}/other": "was trained on another base",
}


@pytest.mark.parametrize("adapter", BAD)
def test_what_does_not_fit_ends_in_one_line_with_nothing_written(
    adapter: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(made / "lora", tmp_path)
    if "other" in adapter:
        other = tmp_path / "another"
        other.mkdir()
        tiny.save_base(other / "base", seed=5)
        tiny.save_tasks(other / "data")
        train(recipe_of(other, tmp_path / "other", "method: lora, rank: 2, alpha: 4, targets: [q_proj]"))
    text = adapter.format(run=made / "run", lora=made / "lora", here=tmp_path)
    try:
        recipe_of(made, tmp_path / "next", text)
    except InputRefused:
        pytest.fail("read without the folder")
    monkeypatch.setattr(sys, "argv", ["qd2mora", "train", str(tmp_path / "next.yaml")])
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code in (2, 6), error
    assert "Traceback" not in error
    assert re.search(BAD[adapter], error), error
    assert not (tmp_path / "next").exists()


def spoil(lora: Path, folder: Path) -> None:
    """Write copies of a LoRA that lack a tensor, are of another width, or are not finite."""
    tensors = load_file(lora / "adapter_model.safetensors")
    name = min(key for key in tensors if "lora_B" in key)
    changed = {
        "missing": {key: each for key, each in tensors.items() if key != name},
        "narrow": tensors | {name: tensors[name][:-2].contiguous()},
        "nan": tensors | {name: torch.full_like(tensors[name], float("nan"))},
    }
    for kind, content in changed.items():
        (folder / kind).mkdir()
        (folder / kind / "adapter_config.json").write_bytes((lora / "adapter_config.json").read_bytes())
        save_file(content, folder / kind / "adapter_model.safetensors", metadata={"format": "pt"})
