"""Recipes of today's bases: each plans for 8, 12 and 24 GB without the model's files, network or licence."""

import json
import sys
from pathlib import Path

import pytest

from qd2mora.base.known_models import known_name
from qd2mora.cli import main
from qd2mora.memory import plan
from qd2mora.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
BASES = ("llama-3.1-8b", "llama-3.2-1b", "llama-3.2-3b", "mistral-7b-v0.3", "qwen3-8b", "gemma-2-9b")


@pytest.fixture(autouse=True)
def _without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qd2mora.base.files.snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))


@pytest.mark.parametrize("name", BASES)
def test_a_recipe_fits_each_card(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert known_name(recipe.base.model) == name
    peaks = []
    for budget in ("8GiB", "12GiB", "24GiB"):
        planned = plan(recipe, budget)
        assert planned.fits, (budget, planned.ways_out)
        peaks.append(planned.peak_bytes)
    assert peaks == sorted(peaks)


def test_a_plan_says_that_the_shape_comes_from_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (tmp_path / "questions.jsonl").write_text('{"instruction": "a", "output": "b"}\n', encoding="utf-8")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text((RECIPES / "llama-3.2-1b.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["qd2mora", "plan", str(recipe), "--budget", "8GiB"])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert "its shape is llama-3.2-1b's in the table of known models" in printed
    (tmp_path / "chats.jsonl").unlink()
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "no file 'chats.jsonl'" in capsys.readouterr().err
