"""A run that was copied goes on where its recipe lies; `~` in a recipe is the user's folder."""

from pathlib import Path

import pytest
import tiny
from trees import copied

from qd2mora.cli.run_verbs import own_folder
from qd2mora.recipe import load_recipe


def test_a_copied_run_goes_on_where_its_recipe_lies_and_says_so(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, before = copied(made / "run", tmp_path / "copy"), str(made / "run")
    assert own_folder(copy / "recipe.yaml", before, []) == str(copy)
    assert str(copy) in capsys.readouterr().out
    assert own_folder(copy / "recipe.yaml", "elsewhere", ["output=elsewhere"]) == "elsewhere"
    assert own_folder(made / "run" / "recipe.yaml", before, []) == before
    assert own_folder(made / "recipe.yaml", "runs/other", []) == "runs/other"
    assert capsys.readouterr().out == ""


def test_a_tilde_of_a_recipe_is_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny.recipe_text(Path("~/base"), Path("~/data"), Path("~/run")), encoding="utf-8")
    loaded = load_recipe(recipe)
    assert loaded.output == str(tmp_path / "run") and loaded.base.model == str(tmp_path / "base")
    assert loaded.data.tasks[0].path == str(tmp_path / "data" / "first.jsonl")
