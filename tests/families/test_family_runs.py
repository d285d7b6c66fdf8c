"""Every family through a whole run: trained, broken off and resumed, exported in each form, and read back."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from exported import without_this_package
from family_models import FAMILIES, WINDOW, save_family
from interrupted import stop_after
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qd2mora.base import load_base
from qd2mora.errors import SignalStop
from qd2mora.merging import ExportOptions, merge
from qd2mora.recipe import Base, Recipe, load_recipe
from qd2mora.run_folder import open_run
from qd2mora.training import train

QUICKLY: dict[str, Any] = {"strategy": "mean_gate", "measured_rows": 0}
"""Any static update will do, however far it is from the routed one: forms of it are compared with each other."""
IDS = torch.randint(4, 490, (2, 40), generator=torch.Generator().manual_seed(5))


def recipe_of(folder: Path, output: str, *overrides: str) -> Recipe:
    text = tiny.recipe_text(folder / "base", folder / "data", folder / output)
    text = text.replace("targets: [q_proj, v_proj, down_proj]", "targets: all-linear").replace("steps: 6", "steps: 3")
    text = text.replace("validation: 8", "validation: 2").replace("eval_every: 3", "eval_every: 9")
    path = folder / f"{output}.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, list(overrides))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a family: its base, tasks and a run, each made when it is first asked for."""
    return tmp_path_factory.mktemp("families")


def run_of(home: Path, name: str) -> Path:
    folder = home / name
    if not folder.exists():
        save_family(name, folder / "base")
        tiny.save_tasks(folder / "data", 12)
        train(recipe_of(folder, "run"))
    return folder


def logits_of(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits.float()


def static_logits(folder: Path) -> Tensor:
    merge(folder / "run", folder / "hf", ExportOptions(dtype="float32", **QUICKLY))
    return logits_of(AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32))


# Llama 3's positions, windows with four norms; in exact exports fused linears and scaled blocks too. Others are long.
RESUMED = ("llama3.2", "gemma3", "phi3", "granite")


SOME = [pytest.param(name, marks=[] if name in RESUMED[:2] else pytest.mark.long) for name in FAMILIES]


@pytest.mark.long
@pytest.mark.parametrize("name", list(FAMILIES))
def test_micro_batches_that_take_turns_in_each_layer_train_the_same_adapter(name: str, home: Path) -> None:
    folder = run_of(home, name)
    changes = ("memory.offload.weights=stream", "memory.offload.activations=cpu", "memory.accumulation=layer")
    train(recipe_of(folder, "turns", *changes))
    ours, theirs = (load_file(folder / run / "adapter" / "adapter_model.safetensors") for run in ("turns", "run"))
    assert all(torch.equal(tensor, ours[key]) for key, tensor in theirs.items())


@pytest.mark.parametrize("name", SOME)
def test_a_run_that_was_broken_off_ends_with_the_same_bytes(
    name: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_of(home, name)
    stop_after(1, monkeypatch)
    with pytest.raises(SignalStop):
        train(recipe_of(folder, "broken"))
    monkeypatch.undo()
    train(recipe_of(folder, "broken"), resume=True)
    whole, resumed = ((folder / run / "adapter" / "adapter_model.safetensors") for run in ("run", "broken"))
    assert whole.read_bytes() == resumed.read_bytes()


@pytest.mark.parametrize("name", SOME)
def test_the_plain_weights_and_the_lora_are_one_model(name: str, home: Path) -> None:
    folder = run_of(home, name)
    merged = static_logits(folder)
    merge(folder / "run", folder / "lora", ExportOptions(to="lora", **QUICKLY))
    on_base = PeftModel.from_pretrained(load_base(Base(model=str(folder / "base"))), str(folder / "lora"))
    torch.testing.assert_close(merged, logits_of(on_base), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("names", [RESUMED, pytest.param(tuple(FAMILIES), marks=pytest.mark.long)])
def test_exact_exports_give_the_routed_logits_where_this_package_is_not(names: tuple[str, ...], home: Path) -> None:
    save_file({"ids": IDS}, home / "ids.safetensors")
    wanted = {}
    for name in names:
        folder = run_of(home, name)
        wanted[name] = logits_of(open_run(folder / "run").model)
        shutil.rmtree(folder / "exact", ignore_errors=True)
        merge(folder / "run", folder / "exact", ExportOptions(to="exact", dtype="float32", measured_rows=0))
    without_this_package(f"""
import pathlib, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
home, found = pathlib.Path({str(home)!r}), {{}}
ids = load_file(home / "ids.safetensors")["ids"]
for folder in sorted(home.glob("*/exact")):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        found[folder.parent.name] = model(input_ids=ids).logits
save_file(found, home / "logits.safetensors")
""")
    found = load_file(home / "logits.safetensors")
    assert found.keys() == wanted.keys()
    for name, logits in wanted.items():
        torch.testing.assert_close(found[name], logits, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("name", SOME)
def test_a_gguf_file_read_as_a_base_gives_the_plain_weights_logits(name: str, home: Path) -> None:
    folder = run_of(home, name)
    merge(folder / "run", folder / "gguf", ExportOptions(to="gguf", with_vocabulary=False, **QUICKLY))
    merge(folder / "run", folder / "half", ExportOptions(dtype="float16", **QUICKLY))
    wanted = AutoModelForCausalLM.from_pretrained(folder / "half", dtype=torch.float32)
    (file,) = (folder / "gguf").glob("*.gguf")
    base = load_base(Base(model=str(file), quantization="none"))
    # The file's vectors are float32, and 16-bit ones in the folder: rounded alike, they are one model.
    theirs = wanted.state_dict()
    for key, tensor in base.state_dict().items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-3, atol=1e-4, msg=key)
    # llama.cpp leaves a Mistral's and a Phi's window out, and the file's context ends with it.
    within = base.config.max_position_embeddings
    assert within == (WINDOW if name in ("mistral", "phi3") else 256)
    for one, other in zip(logits_of(base), logits_of(wanted), strict=True):
        torch.testing.assert_close(one[:within], other[:within], rtol=1e-3, atol=1e-3)
