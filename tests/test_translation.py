"""A neighbour's file as a recipe: what is translated means the same here, and everything else is listed."""

import json
import random
import sys
from pathlib import Path

import pytest
import yaml

from qd2mora.cli import main
from qd2mora.errors import InputRefused
from qd2mora.recipe import Recipe, load_recipe
from qd2mora.recipe.axolotl import AXOLOTL
from qd2mora.recipe.llama_factory import LLAMA_FACTORY
from qd2mora.recipe.problems import NEIGHBOURS
from qd2mora.recipe.translation import Neighbour, task_name, translate

OF_AXOLOTL = """
base_model: some/model-1b
load_in_4bit: true
adapter: qlora
datasets:
  - {path: someone/instructions, type: alpaca}
  - path: talks.jsonl
    type: chat_template
    field_messages: turns
    field_tools: functions
    message_property_mappings: {role: who, content: text}
  - {path: novels.txt, type: completion}
  - {path: pages.jsonl, type: completion, field: body}
  - {path: pairs.jsonl, type: input_output}
val_set_size: 0.05
sequence_len: 1024
sample_packing: true
train_on_inputs: true
lora_r: 8
lora_alpha: 32
lora_target_linear: true
micro_batch_size: 2
gradient_accumulation_steps: 8
num_epochs: 3
optimizer: adamw_bnb_8bit
learning_rate: 1e-4
gradient_checkpointing: true
special_tokens: {pad_token: <pad>}
loraplus_lr_ratio: 16
lora_dropout:
output_dir: out
"""
OF_LLAMA_FACTORY = """
model_name_or_path: some/model-8b
quantization_bit: 8
stage: sft
finetuning_type: lora
lora_target: q_proj,v_proj
dataset: talks,questions,elsewhere
dataset_dir: rows
max_samples: 500
per_device_train_batch_size: 1
gradient_accumulation_steps: 4
max_steps: 100
optim: adamw_torch
lr_scheduler_type: polynomial
report_to: none
output_dir: out
"""
LISTED = {
    "talks": {
        "file_name": "talks.json",
        "formatting": "sharegpt",
        "columns": {"messages": "turns", "tools": "functions"},
        "ranking": True,
    },
    "questions": {"hf_hub_url": "someone/questions", "columns": {"prompt": "q", "response": "a", "history": "before"}},
}


def translated(neighbour: Neighbour, text: str, folder: Path) -> tuple[Recipe, list[str]]:
    found = translate(neighbour, yaml.safe_load(text.replace("1e-4", "1.0e-4")), folder)
    return Recipe.model_validate(found.content), found.left


def test_a_file_of_axolotl_means_the_same_here(tmp_path: Path) -> None:
    recipe, left = translated(AXOLOTL, OF_AXOLOTL, tmp_path)
    assert recipe.base.model == "some/model-1b" and recipe.base.quantization == "nf4"
    adapter, train = recipe.adapter, recipe.train
    assert (adapter.method, adapter.rank, adapter.alpha, adapter.targets) == ("lora", 8, 32.0, "all-linear")
    assert (train.micro_batch, train.global_batch, train.epochs, train.steps) == (2, 16, 3.0, None)
    assert (train.optimizer, train.learning_rate, train.schedule) == ("adamw_8bit", 1e-4, "cosine")
    assert (recipe.data.max_length, recipe.data.packing, recipe.data.mask_prompt) == (1024, True, False)
    first, second, novels, pages = recipe.data.tasks
    assert (first.name, first.path, first.format) == ("instructions", "hub:someone/instructions:train", "instruction")
    assert second.fields == {"messages": "turns", "role": "who", "content": "text", "tools": "functions"}
    assert (novels.path, novels.format, novels.fields) == ("novels.txt", "text", None)
    assert (pages.format, pages.fields) == ("text", {"text": "body"})
    assert recipe.memory.checkpointing == "on" and recipe.output == "out"
    for words in ("'input_output'; there are", "val_set_size: 0.05", "special_tokens", "loraplus_lr_ratio: 16"):
        assert sum(words in line for line in left) == 1, left
    assert len(left) == 4


def test_a_file_of_llama_factory_means_the_same_here(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "dataset_info.json").write_text(json.dumps(LISTED), encoding="utf-8")
    recipe, left = translated(LLAMA_FACTORY, OF_LLAMA_FACTORY, tmp_path)
    assert recipe.adapter.targets == ["q_proj", "v_proj"] and recipe.adapter.rank == 8
    assert (recipe.train.steps, recipe.train.epochs, recipe.train.global_batch) == (100, None, 4)
    assert (recipe.train.learning_rate, recipe.data.max_length) == (5e-5, 2048)
    talks, questions = recipe.data.tasks
    assert talks.path == str(tmp_path / "rows" / "talks.json") and talks.limit == 500
    assert talks.fields == {"messages": "turns", "role": "from", "content": "value", "tools": "functions"}
    assert questions.path == "hub:someone/questions:train"
    assert questions.fields == {"instruction": "q", "output": "a"}
    for words in ("quantization_bit: 8 (8-bit", "polynomial", "stage: sft", "elsewhere", "ranking", "history"):
        assert sum(words in line for line in left) == 1, left
    assert len(left) == 6


@pytest.mark.parametrize(("neighbour", "text"), [(AXOLOTL, OF_AXOLOTL), (LLAMA_FACTORY, OF_LLAMA_FACTORY)])
def test_what_a_neighbour_leaves_out_is_its_own_default(neighbour: Neighbour, text: str, tmp_path: Path) -> None:
    given = yaml.safe_load(text.replace("1e-4", "1.0e-4"))
    left_out = {key: value for key, value in given.items() if key not in neighbour.defaults}
    explicit = translate(neighbour, dict(neighbour.defaults) | left_out, tmp_path)
    assert translate(neighbour, left_out, tmp_path) == explicit


@pytest.mark.parametrize("neighbour", [AXOLOTL, LLAMA_FACTORY])
def test_every_key_is_in_the_recipe_or_in_the_list_whatever_its_value(neighbour: Neighbour, tmp_path: Path) -> None:
    chance = random.Random(0)
    values = [None, True, -1, 3, 0.5, 1e308, float("inf"), float("nan"), 10**400, "", "x", "4"]
    values += [[], [1], ["a"], {"a": 1}, [{}]]
    names = [*neighbour.keys, *neighbour.reasons, *neighbour.batch, "datasets", "dataset", "dataset_dir", "unknown", 1]
    read = (*neighbour.keys, *neighbour.batch, "datasets", "dataset", "dataset_dir")
    for _ in range(400):
        given = {name: chance.choice(values) for name in chance.sample(names, 8)}
        found = translate(neighbour, given, tmp_path)
        for name, value in given.items():
            if value is not None and name not in read:
                assert any(line.startswith(f"{name}: ") for line in found.left)


def test_neighbours_names_lead_where_their_errors_point() -> None:
    for neighbour in (AXOLOTL, LLAMA_FACTORY):
        for name, key in neighbour.keys.items():
            assert name not in NEIGHBOURS or NEIGHBOURS[name].split(" ")[0].rstrip(":") == key.ours, name


def test_the_verb_prints_a_recipe_that_loads_and_tells_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "theirs.yaml").write_text(OF_AXOLOTL, encoding="utf-8")
    for arguments, code in (
        (["--from", "axolotl", str(tmp_path / "theirs.yaml")], 0),
        (["--from", "axolotl"], 2),
        (["--from", "axlotl", "x"], 2),
        (["--from", "axolotl", str(tmp_path / "nothing.yaml")], 2),
    ):
        monkeypatch.setattr(sys, "argv", ["qd2mora", "recipes", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert ended.value.code == code
        if code:
            assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
            continue
        (tmp_path / "ours.yaml").write_text(printed.out, encoding="utf-8")
        assert load_recipe(tmp_path / "ours.yaml").train.global_batch == 16
        assert printed.err.count("not translated: ") == printed.err.count("\n") == 4


def test_a_secret_is_neither_translated_nor_told(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="holds no secrets"):
        translate(AXOLOTL, {"base_model": "hf_" + "a" * 30}, tmp_path)


def test_a_task_has_a_name_of_its_own() -> None:
    taken: list[dict[str, object]] = []
    named = {"a/b c.jsonl": "b_c", "x/b c.jsonl": "b_c-2", "b c": "b_c-3", "...": "task", "é": "task-2"}
    for path, name in named.items():
        assert task_name(path, taken) == name
        taken.append({"name": name})
