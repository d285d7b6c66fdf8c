"""The recipe that comes along, as it is: a planted taste is learned in two minutes, on pairs that were held out."""

import json
import time
from pathlib import Path

import pytest

from qd2mora.recipe import load_recipe
from qd2mora.training import train

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_the_quick_starts_base_learns_a_planted_taste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QD2MORA_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(ROOT / "recipes" / "quickstart-dpo.yaml", [f"output={tmp_path / 'run'}"])
    began = time.process_time()
    train(recipe)
    assert time.process_time() - began < 120
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if "eval_measures" in line][-1]
    assert last["eval_measures"]["taste"]["accuracy"] >= 0.95


def test_no_pair_of_words_is_learned_and_held_out() -> None:
    found = []
    for name in ("taste", "taste.test"):
        path = ROOT / "recipes" / "quickstart" / "data" / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found.append({(row["chosen"], row["rejected"]) for row in rows})
    assert len(found[1]) == 200 and not found[0] & found[1]
