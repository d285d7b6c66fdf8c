"""CAT's learned weights: where they start, that they never lose, and that nothing but them is learned."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from qd2mora.base import load_tokenizer
from qd2mora.composition import ComposeOptions, compose, learned
from qd2mora.composition.inputs import read_loras
from qd2mora.data import collate, prepare
from qd2mora.errors import InputRefused
from qd2mora.recipe import load_recipe

GIVEN = "0.6,0.6"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a recipe of two small tasks on it, and two random LoRAs, of several ranks and linears."""
    home = tmp_path_factory.mktemp("learned")
    base = tiny.save_base(home / "base", tied=False)
    tiny.save_tasks(home / "data", 12)
    text = tiny.recipe_text(base, home / "data", home / "run").replace(f"{base}}}", f"{base}, quantization: none}}")
    (home / "recipe.yaml").write_text(text, encoding="utf-8")
    for number, (rank, targets) in enumerate(((4, ["q_proj", "up_proj"]), (2, ["q_proj", "v_proj"]))):
        torch.manual_seed(number)
        config = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for name, tensor in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(tensor, std=0.2)
        model.save_pretrained(home / f"lora-{number}")
    return home


def composed(home: Path, out: Path, *, steps: int | None, weights: str = GIVEN) -> Path:
    learn_on = None if steps is None else home / "recipe.yaml"
    folders = [str(home / f"lora-{number}") for number in range(2)]
    return compose("cat", folders, out, ComposeOptions(weights, learn=learn_on, steps=steps)).folder


def calibration_loss(home: Path, adapter: Path) -> float:
    """The loss over all training rows (fewer than are sampled), by PEFT and transformers alone."""
    recipe = load_recipe(home / "recipe.yaml")
    tokenizer = load_tokenizer(recipe.base.model)
    tasks = prepare(recipe.data, tokenizer, recipe.train.seed)
    rows = [row for task in tasks for row in task.train]
    assert 1 < len(rows) < learned.ROWS
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "base"), adapter)
    batch = collate(rows, tokenizer.pad_token_id)
    known = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        return float(model.eval()(**known).loss)


def test_no_step_gives_the_given_weights_to_the_bit(home: Path, tmp_path: Path) -> None:
    plain, unlearned = composed(home, tmp_path / "plain", steps=None), composed(home, tmp_path / "zero", steps=0)
    name = "adapter_model.safetensors"
    assert (plain / name).read_bytes() == (unlearned / name).read_bytes()


def test_learned_weights_lose_less_on_their_rows_and_nothing_else_moves(home: Path, tmp_path: Path) -> None:
    given = calibration_loss(home, composed(home, tmp_path / "given", steps=None))
    out = composed(home, tmp_path / "out", steps=30)
    assert calibration_loss(home, out) < given - 0.01
    tensors = load_file(out / "adapter_model.safetensors")
    loras = read_loras([str(home / f"lora-{number}") for number in range(2)])
    seen = set()
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"):
        down, up = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert down.equal(torch.cat([lora.pairs[name][0] for lora in loras]))
        for mine, lora in zip(up.split([4, 2], 1), loras, strict=True):
            theirs = lora.scaling * lora.pairs[name][1]
            weight = float((mine * theirs).sum() / theirs.square().sum())
            torch.testing.assert_close(mine, weight * theirs)
            seen.add(round(weight, 3))
    assert len(seen) == 4 and json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 6


def test_what_learning_spoils_is_not_kept(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def upwards(model: object, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return -losses(model, batch) if torch.is_grad_enabled() else losses(model, batch)

    losses = learned._losses
    monkeypatch.setattr(learned, "_losses", upwards)
    given, spoilt = (composed(home, tmp_path / str(steps), steps=steps) for steps in (None, 6))
    name = "adapter_model.safetensors"
    assert (given / name).read_bytes() == (spoilt / name).read_bytes()


def test_another_base_is_refused(home: Path, tmp_path: Path) -> None:
    text = (home / "recipe.yaml").read_text(encoding="utf-8").replace(str(home / "base"), str(tmp_path / "other"))
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(InputRefused, match=r"--learn: the recipe's base is .*other, the adapters' .*base"):
        compose("cat", [str(home / "lora-0")], tmp_path / "out", ComposeOptions(learn=tmp_path / "recipe.yaml"))
    with pytest.raises(InputRefused, match="--steps: nothing learns"):
        compose("cat", [str(home / "lora-0")], tmp_path / "out", ComposeOptions(steps=3))
