"""The recipe: strict, and every mistake answered with what would do."""

import copy
import random
from pathlib import Path

import pytest
import yaml

from qd2mora.errors import InputRefused
from qd2mora.recipe import Recipe, load_recipe, parse_recipe
from qd2mora.recipe.shipped import shipped_recipes
from qd2mora.recipe.yaml_file import MAX_BYTES, parse_yaml

EXAMPLE = """
base:     {model: meta-llama/Llama-2-7b-hf, quantization: nf4, double_quant: true, compute_dtype: auto}
adapter:  {method: d2mora, rank: 16, alpha: 32, dropout: 0.05, targets: [q_proj, k_proj, v_proj],
           down: {experts: 4}, up: {experts: 3}}
data:
  tasks:
    - {name: boolq, path: data/boolq.jsonl, format: instruction, weight: 1.0, validation: 200}
    - {name: siqa, path: data/siqa.parquet, format: instruction, weight: 2.0}
  mix: tokens
  max_length: 512
  packing: false
  mask_prompt: true
train:    {steps: 1000, micro_batch: auto, global_batch: 16, learning_rate: 3.0e-4, schedule: linear,
           warmup_steps: 100, optimizer: adamw_8bit, seed: 0, save_every: 100, eval_every: 100}
memory:   {budget: 8GiB, checkpointing: auto,
           offload: {activations: auto, embeddings: auto, optimizer: none, weights: none}, engine: none}
output:   runs/llama2-7b-d2mora
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, *overrides: str, text: str = EXAMPLE) -> str:
    with pytest.raises(InputRefused) as caught:
        load_recipe(write(folder, text), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_example_loads_and_its_dump_loads_equal(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, EXAMPLE))
    assert parse_recipe(parse_yaml(recipe.dump_yaml(), "dump")) == recipe


@pytest.mark.parametrize("path", shipped_recipes().values(), ids=lambda path: path.stem)
def test_a_shipped_recipe_loads(path: Path) -> None:
    assert isinstance(load_recipe(path), Recipe)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("adapter.rnak=8", "did you mean adapter.rank"),
        ("adapter.lora_r=8", "adapter.rank"),
        ("lora_alpha=8", "adapter.alpha"),
        ("data.cutoff_len=256", "data.max_length"),
        ("train.num_epochs=3", "train.epochs"),
        ("steps=3", "train.steps"),
        ("adapter.rank=0", "adapter.rank: 0"),
        ("adapter.rank='8'", "adapter.rank: '8'"),
        ("adapter.rank=1.5", "adapter.rank: 1.5"),
        ("adapter.dropout=1", "adapter.dropout"),
        ("adapter.targets=3", "adapter.targets: 3"),
        ("train.learning_rate=.nan", "finite"),
        ("train.epochs=2", "either steps or epochs"),
        ("train.steps=null", "train.steps, train.epochs and data.stop"),
        ("train.micro_batch=3", "multiple"),
        ("train.optimizer=sgd", "adamw"),
        ("data.tasks.1.name=boolq", "two tasks"),
        ("data.tasks.1.weight=null", "weight"),
        ("data.tasks.0.name=../up", "data.tasks.0.name"),
        ("memory.budget=8", "budget"),
        ("memory.engine=fsdp", "engine"),
        ("data.tasks.7.name=x", "position from 0 to 1"),
        ("base.model.x=1", "holds a value"),
        ("nonsense", "key=value"),
        ("train.steps=[1", "not valid YAML"),
        ("output=null", "output"),
    ],
)
def test_a_mistake_is_answered_with_what_would_do(override: str, words: str, tmp_path: Path) -> None:
    assert words in refusal(tmp_path, override)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("- a\n- b\n", "mapping"),
        ("base: {model: x}\nbase: {model: y}\n", "line 2"),
        ("base: &a {model: x}\ndata: *a\n", "aliases"),
        ("base: !!python/object:os.system {}\n", "line 1"),
        ("base: {model: x\n", "not valid YAML"),
        ("base: \x00\n", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("x: " + "y" * MAX_BYTES, "too long"),
    ],
)
def test_text_that_is_no_recipe_is_refused(text: str, words: str, tmp_path: Path) -> None:
    assert words in refusal(tmp_path, text=text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"nothing\.yaml"):
        load_recipe(tmp_path / "nothing.yaml")


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    text = EXAMPLE.replace("3.0e-4", "1e-4")
    assert load_recipe(write(tmp_path, text)).train.learning_rate == 1e-4
    assert load_recipe(write(tmp_path, EXAMPLE), ["train.learning_rate=2e-5"]).train.learning_rate == 2e-5


def test_on_and_off_are_words_and_true_and_false_are_not(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, EXAMPLE), ["memory.checkpointing=on", "data.mask_prompt=false"])
    assert (recipe.memory.checkpointing, recipe.data.mask_prompt) == ("on", False)


def test_overrides_reach_lists_and_sections_that_were_left_out(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, EXAMPLE), ["data.tasks.0.limit=5", "finish.score=true", "train.steps=3"])
    assert (recipe.data.tasks[0].limit, recipe.finish.score, recipe.train.steps) == (5, True, 3)


def test_paths_beside_the_recipe_win(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "boolq.jsonl").write_text("{}", encoding="utf-8")
    tasks = load_recipe(write(tmp_path, EXAMPLE)).data.tasks
    assert tasks[0].path == str(tmp_path / "data" / "boolq.jsonl")
    assert tasks[1].path == "data/siqa.parquet"


def test_the_fingerprint_follows_what_decides_the_weights_and_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path, EXAMPLE)
    before = load_recipe(path).fingerprint()
    for harmless in ("output=elsewhere", "train.micro_batch=4", "memory.budget=9GiB", "train.save_every=7"):
        assert load_recipe(path, [harmless]).fingerprint() == before, harmless
    for decisive in ("train.seed=1", "adapter.rank=8", "data.max_length=64", "base.model=other", "train.steps=9"):
        assert load_recipe(path, [decisive]).fingerprint() != before, decisive


def _mutate(node: object, chance: random.Random) -> None:
    odd = [None, -1, 0, 10**400, 1e308, "", "\u202e", "a" * 300, [], {}, [[[]]], True, float("inf"), {"x": {"y": 1}}]
    while isinstance(node, dict | list) and node:
        key = chance.choice(list(node)) if isinstance(node, dict) else chance.randrange(len(node))
        if chance.random() < 0.4:
            action = chance.randrange(3)
            if action == 0:
                del node[key]
            elif action == 1:
                node[key] = copy.deepcopy(chance.choice(odd))
            elif isinstance(node, dict):
                node[chance.choice([f"{key}s", f"{key}"[:-1], "\n", "é", 5, None])] = node.pop(key)
            return
        node = node[key]


@pytest.mark.long
def test_two_thousand_mangled_recipes_are_accepted_or_refused_in_one_line() -> None:
    chance = random.Random(0)
    refused, whole = 0, yaml.safe_load(EXAMPLE)
    whole["train"]["learning_rate"] = 3e-4
    for _ in range(2000):
        content = copy.deepcopy(whole)
        for _ in range(chance.randrange(1, 4)):
            _mutate(content, chance)
        try:
            parse_recipe(content)
        except InputRefused as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
    assert refused > 1000


def test_a_resolved_recipe_of_before_opens_though_a_key_of_gates_is_no_more() -> None:
    content = parse_yaml(EXAMPLE, "example")
    content["adapter"]["gates"] = {"down": {"temperature": 0.7, "capacity": None}}
    assert parse_recipe(content).adapter.gates["down"].temperature == 0.7
    content["adapter"]["gates"]["down"]["capacity"] = 4
    with pytest.raises(InputRefused, match="capacity"):
        parse_recipe(content)


def test_all_unknown_keys_are_named_in_one_line_each_with_what_would_do() -> None:
    content = {
        "base": {"model": "x", "lora": 1},
        "adapter": {"rnak": 4},
        "data": {"tasks": [{"name": "a", "path": "b", "pth": "c"}]},
        "train": {"steps": 1},
        "output": "o",
    }
    with pytest.raises(InputRefused) as found:
        parse_recipe(content)
    line = str(found.value)
    assert line.startswith("recipe: 3 unknown keys: ") and "\n" not in line
    for words in ("base.lora (", "adapter.rnak (did you mean adapter.rank?)", "data.tasks.0.pth ("):
        assert words in line
    neighbours = {"cutoff_len": 1, "lora_r": 2, "micro_batch_size": 3}
    with pytest.raises(InputRefused, match=r"lora_r \(here it is adapter.rank\).*recipes --from axolotl"):
        parse_recipe({"base": {"model": "x"}, "train": {"steps": 1}, "output": "o", **neighbours})
    with pytest.raises(InputRefused, match=r"20000 unknown keys: .* and 19980 more") as many:
        parse_recipe({str(place): 1 for place in range(20_000)})
    assert len(str(many.value)) < 2000
