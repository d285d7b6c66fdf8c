"""Failures and corrections by category: which is due, which expert learns, and what its neighbours keep."""

import json
import random
import re
from pathlib import Path

import judged_runs as runs
import pytest
import tiny
import torch
from interrupted import train_in_two

from qd2mora.base import load_base
from qd2mora.errors import InputRefused
from qd2mora.mixture import MixtureConfig, add_adapter
from qd2mora.recipe import Recipe, load_recipe
from qd2mora.training import train


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save two categories: a short failure is likelier than a long correction, and pairs that say both."""
    folder, draw = tmp_path_factory.mktemp("consolidated"), random.Random(0)
    tiny.save_base(folder / "base")
    rows: dict[str, list[dict[str, str]]] = {"cook": [], "dig": []}
    for number in range(24):
        prompt = f"{number} {' '.join(draw.choice(tiny.WORDS) for _ in range(3))}: "
        rows["cook"].append({"prompt": prompt, "chosen": "sun sun sun sun sun", "rejected": "moon"})
        both = ["one two", "three"]
        rows["dig"] += [{"prompt": prompt, "chosen": both[turn], "rejected": both[1 - turn]} for turn in (0, 1)]
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QD2MORA_CACHE", str(tmp_path / "cache"))


def recipe_of(made: Path, output: Path, tasks: tuple[str, ...], *changes: str) -> Recipe:
    path, listed = (
        output.with_suffix(".yaml"),
        "".join(
            f"\n    - {{name: {name}, path: {made / name}.jsonl, format: preference, validation: 4}}" for name in tasks
        ),
    )
    path.write_text(
        f"""
base: {{model: {made / "base"}}}
adapter: {{method: peam, rank: 4, alpha: 8, targets: [q_proj, v_proj]}}
data:
  max_length: 64
  tasks:{listed}
objective: {{kind: peam, consolidate: due}}
train: {{steps: 12, micro_batch: 2, global_batch: 4, learning_rate: 5e-3, save_every: 4, eval_every: 12}}
output: {output}
""",
        encoding="utf-8",
    )
    return load_recipe(path, list(changes))


def test_a_category_that_is_due_is_learned_and_the_expert_of_one_that_waits_keeps_its_bits(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(made, tmp_path / "run", ("cook", "dig"))
    train_in_two(recipe, 6, monkeypatch)
    told = " ".join("".join(capsys.readouterr()).split())
    assert re.search(r"task cook: of (\d+) pairs the reference repeats \1 failures: due, and learned", told), told
    assert re.search(r"task dig: of \d+ pairs .* not due, its rows are passed over", told)
    found = runs.adapter_of(tmp_path / "run")
    start = add_adapter(load_base(recipe.base), MixtureConfig.from_recipe(recipe.adapter, 2), recipe.train.seed)
    before = {name.replace(".default", ""): tensor for name, tensor in start.named_parameters()}
    for name, tensor in found.items():
        assert torch.equal(tensor[1:], before[name][1:]), name
        assert not torch.equal(tensor[0], before[name][0]), name
    first, last = (line for line in runs.lines_of(tmp_path / "run") if "eval_loss" in line)
    assert first["eval_loss"]["dig"] == last["eval_loss"]["dig"]
    assert last["eval_measures"]["cook"]["accuracy"] == 1.0 > first["eval_measures"]["cook"]["accuracy"]
    assert last["eval_loss"]["cook"] < first["eval_loss"]["cook"]


def test_where_no_category_is_due_nothing_is_learned_and_one_line_says_so(made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="consolidate: due, but no task is"):
        train(recipe_of(made, tmp_path / "run", ("dig",), "data.tasks.0.validation=0", "train.steps=20"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["objective.reference=live"], "reference: kept, not live"),
        (["train.steps=null", "train.epochs=1"], "give train.steps"),
        (["objective={kind: dpo, consolidate: due}"], "consolidate is no setting of dpo"),
        (["objective={kind: peam, contrast: -1}"], "contrast"),
    ],
)
def test_what_cannot_be_is_refused(changes: list[str], words: str, made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=words):
        recipe_of(made, tmp_path / "run", ("cook", "dig"), *changes)
