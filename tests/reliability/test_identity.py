"""I1: a resume in a changed world is refused by name; what cannot matter passes."""

import json
import shutil
from pathlib import Path

import forked_runs as runs
import pytest

from qd2mora.base import load_base
from qd2mora.disk.sealed import seal_text, unseal_text
from qd2mora.errors import DamagedFile, InputRefused
from qd2mora.recipe import load_recipe
from qd2mora.run_folder import open_run
from qd2mora.training import train

CHANGES = [
    "base.double_quant=false", "base.compute_dtype=float32", "adapter.rank=3", "adapter.alpha=9", "adapter.dropout=0.2",
    "adapter.dropout_per_expert=true", "adapter.targets=[q_proj]",
    "adapter.down={experts: 2}", "adapter.up={experts: 2}",
    "adapter.penalty=0.5", "adapter.method=hydralora", "data.max_length=64", "data.mask_prompt=false",
    "data.tasks.0.limit=10", "data.tasks.0.validation=1", "data.tasks.1.name=other", "train.steps=9",
    "train.global_batch=8", "train.learning_rate=1e-3", "train.schedule=cosine", "train.warmup_steps=2",
    "train.optimizer=adamw_8bit", "train.weight_decay=0.1", "train.max_grad_norm=2.0", "train.seed=1",
]  # fmt: skip
HARMLESS = [
    "train.save_every=3", "train.eval_every=2", "train.keep_checkpoints=3", "train.log_every=2", "train.micro_batch=1",
    "train.time_limit=2h", "memory.checkpointing=on", "memory.budget=8GiB", "finish.score=true",
]  # fmt: skip
FIELDS = [
    "versions.torch",
    "versions.transformers",
    "versions.qd2mora",
    "device",
    "threads",
    "instructions",
    "processes",
    "engine",
    "tokenizer",
    "base",
]


@pytest.fixture(scope="module")
def copied(made: Path, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on data and base of its own, which a test may change and put back."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(made, folder, dirs_exist_ok=True)
    recipe = runs.write_recipe(folder, folder / "run", "train.steps=2", "adapter.dropout=0.1")
    train(load_recipe(recipe))
    return recipe


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_key_is_refused_by_name(change: str, copied: Path) -> None:
    name = change.partition("=")[0].replace("tasks.0", "tasks").replace("tasks.1.name", "tasks")
    with pytest.raises(InputRefused, match=rf"{name.partition('tasks')[0]}.*--allow-changed"):
        train(load_recipe(copied, [change]), resume=True)


@pytest.mark.parametrize("change", HARMLESS)
def test_what_cannot_change_the_weights_passes(change: str, copied: Path) -> None:
    train(load_recipe(copied, [change]), resume=True)


@pytest.mark.parametrize("edit", ["reversed", "shorter", "edited", "repeated"])
def test_changed_data_is_refused_by_task(edit: str, copied: Path) -> None:
    path = copied.parent / "data" / "last.jsonl"
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    changed = {
        "reversed": lines[::-1],
        "shorter": lines[1:],
        "edited": [lines[0].replace("word", "wors"), *lines[1:]],
        "repeated": [*lines, lines[0]],
    }[edit]
    path.write_text("\n".join(changed) + "\n", encoding="utf-8")
    try:
        with pytest.raises(InputRefused, match=r"data\.last changed"):
            train(load_recipe(copied), resume=True)
    finally:
        path.write_text(text, encoding="utf-8")


def test_a_changed_tokenizer_is_refused_though_it_makes_the_same_rows(copied: Path) -> None:
    path = copied.parent / "base" / "tokenizer_config.json"
    before = path.read_text(encoding="utf-8")
    path.write_text(json.dumps({**json.loads(before), "chat_template": "{{ messages }}"}), encoding="utf-8")
    try:
        with pytest.raises(InputRefused, match="tokenizer changed"):
            train(load_recipe(copied), resume=True)
    finally:
        path.write_text(before, encoding="utf-8")


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_the_world_is_compared_and_can_be_allowed(field: str, copied: Path) -> None:
    path = copied.with_suffix("") / "manifest.json"
    before = path.read_bytes()
    manifest = unseal_text(before, "")
    manifest["identity"][field] = "other"
    path.write_text(seal_text(manifest), encoding="utf-8")
    try:
        with pytest.raises(InputRefused, match=rf"{field} changed.*--allow-changed {field}"):
            train(load_recipe(copied), resume=True)
        train(load_recipe(copied), resume=True, allow_changed=[field])
        assert list(unseal_text(path.read_bytes(), "")["lineage"][-1]["changed"]) == [field]
    finally:
        path.write_bytes(before)


def test_a_changed_bit_of_the_base_is_refused_on_resume_and_on_loading_unless_told(copied: Path) -> None:
    weights = copied.parent / "base" / "model.safetensors"
    before = weights.read_bytes()
    content = bytearray(before)
    content[-3] ^= 1
    weights.write_bytes(content)
    try:
        with pytest.raises(InputRefused, match="base changed"):
            train(load_recipe(copied), resume=True)
        with pytest.raises(InputRefused, match="--allow-changed base"):
            open_run(copied.with_suffix(""))
        open_run(copied.with_suffix(""), allow_changed=["base"])
    finally:
        weights.write_bytes(before)


def test_an_adapter_on_another_quantisation_is_refused_unless_told(copied: Path) -> None:
    path = copied.with_suffix("") / "recipe.yaml"
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace("quantization: nf4", "quantization: none"), encoding="utf-8")
    try:
        with pytest.raises(InputRefused, match=r"base\.quantization"):
            open_run(copied.with_suffix(""))
        open_run(copied.with_suffix(""), allow_changed=["base.quantization"])
    finally:
        path.write_text(before, encoding="utf-8")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "manifest.json"])
def test_a_changed_bit_of_a_finished_adapter_is_found(name: str, copied: Path) -> None:
    path = copied.with_suffix("") / "adapter" / name
    before = path.read_bytes()
    for place in (1, len(before) // 2, len(before) - 2):
        content = bytearray(before)
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(DamagedFile):
            open_run(copied.with_suffix(""))
    path.write_bytes(before)
    assert json.loads((path.parent / "adapter_config.json").read_text())["peft_type"] == "QD2MORA"
    assert load_base(load_recipe(copied).base) is not None
