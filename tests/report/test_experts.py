"""The suggestion of a number of experts, from a recipe to a table."""

import json
from pathlib import Path

import pytest
import tiny

from qd2mora.cli import main

KINDS = {"colours": "red blue green", "sky": "sun moon star", "animals": "cat dog bird"}


def test_the_kinds_of_prompt_in_a_recipe_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.save_tokenizer(tmp_path / "base")
    tasks = []
    for name, words in KINDS.items():
        rows = [{"prompt": f"{words} {words} {number % 7} ", "completion": "one"} for number in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        tasks.append(f"    - {{name: {name}, path: {tmp_path / name}.jsonl, format: completion}}")
    recipe = tmp_path / "recipe.yaml"
    text = [f"base: {{model: {tmp_path / 'base'}}}", "data:", "  tasks:", *tasks, "train: {steps: 1}", "output: run"]
    recipe.write_text("\n".join(text), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["qd2mora", "suggest-experts", str(recipe), "--json", "--most", "6"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["experts"] == 3 and found["prompts"] == 120 and not found["is_weak"]
    assert sorted(max(counts) for counts in found["tasks"].values()) == [40, 40, 40]
    monkeypatch.setattr("sys.argv", ["qd2mora", "suggest-experts", str(recipe)])
    with pytest.raises(SystemExit):
        main()
    assert "adapter.up.experts=3" in capsys.readouterr().out
