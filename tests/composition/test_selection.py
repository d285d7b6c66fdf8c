"""Choosing from a bank by a few rows: the planted best is taken, its copy and a guesser are not, and like rows are."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from qd2mora.cli import main
from qd2mora.composition.bank import Candidate, chosen_of, likeness, near_and_new
from qd2mora.composition.selection import SelectOptions, select
from qd2mora.errors import InputRefused
from qd2mora.mixture.trained_loras import TrainedLora
from qd2mora.recipe import load_recipe
from qd2mora.training import train

ANSWERS = {"best": "red", "other": "red", "guesser": "two"}


def rows_of(words: str, answer: str, places: range) -> list[dict[str, str]]:
    return [
        {
            "instruction": f"{words} {tiny.WORDS[place % 12]} {tiny.WORDS[place // 12 % 12]}",
            "input": "",
            "output": answer,
        }
        for place in places
    ]


def save_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def save_recipe(folder: Path, name: str, data: Path, seed: int = 0) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(
        f"base: {{model: {folder / 'base'}, quantization: none}}\n"
        "adapter: {method: lora, rank: 4, alpha: 16, targets: [q_proj, v_proj, down_proj]}\n"
        f"data: {{tasks: [{{name: task, path: {data}, validation: 4}}], max_length: 128}}\n"
        f"train: {{steps: 16, micro_batch: 8, global_batch: 8, learning_rate: 2e-2, seed: {seed}}}\n"
        f"output: {folder / 'bank' / name}\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of a LoRA that knows the answer, its copy in other factors, one more that knows, and one that guesses."""
    folder = tmp_path_factory.mktemp("bank")
    tiny.save_base(folder / "base")
    for seed, (name, answer) in enumerate(ANSWERS.items()):
        save_rows(folder / f"{name}.jsonl", rows_of("bird cat dog", answer, range(40)))
        train(load_recipe(save_recipe(folder, name, folder / f"{name}.jsonl", seed)))
    copy = folder / "bank" / "copy"
    shutil.copytree(folder / "bank" / "best" / "adapter", copy)
    (copy / "manifest.json").unlink()
    tensors = load_file(copy / "adapter_model.safetensors")
    written_otherwise = {name: 2 * each if "_B" in name else 0.5 * each for name, each in tensors.items()}
    save_file(written_otherwise, copy / "adapter_model.safetensors")
    (folder / "bank" / "empty").mkdir()
    save_rows(folder / "few.jsonl", rows_of("bird cat dog", "red", range(60, 72)))
    near = rows_of("bird cat dog", "red", range(100, 112))
    far = rows_of("sun moon star one two three", "blue", range(12))
    save_rows(folder / "pool.jsonl", [*far, *near, *near[:6], *rows_of("bird cat dog", "red", range(60, 64))])
    save_recipe(folder, "my", folder / "few.jsonl")
    return folder


def test_the_best_is_chosen_and_its_copy_and_a_guesser_are_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["select", folder / "my.yaml", "--bank", folder / "bank", "--pool", folder / "pool.jsonl", "--rows", "8"]
    monkeypatch.setattr(sys, "argv", ["qd2mora", *map(str, given)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 0 and "scored on 12 rows; the base alone: 0% right" in said.out
    verdicts = {Path(line.split(":")[0]).name: line for line in said.out.splitlines() if "score" in line}
    assert "chosen" in verdicts["other"] and "hardly better than the base" in verdicts["guesser"]
    # One of the two that are the same update, in whatever factors.
    assert ["chosen" in verdicts[name] for name in ("best", "copy")].count(True) == 1
    assert "a copy of" in said.out and "8 rows of" in said.out

    recipe = load_recipe(folder / "my-rocket.yaml")
    assert recipe.adapter.method == "rocket" and len(recipe.adapter.adapters or ()) == 2
    picked = [json.loads(line) for line in (folder / "my-rocket.rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(picked) == 8 and all("bird cat dog" in row["prompt"] for row in picked)
    assert len({row["prompt"] for row in picked}) == 8
    few = [row["instruction"] for row in rows_of("bird cat dog", "red", range(60, 72))]
    assert not any(f"{words}\n" in row["prompt"] for words in few for row in picked)


@pytest.mark.long
def test_the_recipe_that_is_written_trains(folder: Path, tmp_path: Path) -> None:
    asked = load_recipe(folder / "my.yaml"), SelectOptions(folder / "bank", folder / "pool.jsonl"), tmp_path / "r.yaml"
    select(*asked)
    # As a kill between the two files leaves it: the rows alone, which stay, and the next try goes on.
    (tmp_path / "r.yaml").unlink()
    select(*asked)
    (tmp_path / "s.rows.jsonl").write_text("somebody's\n", encoding="utf-8")
    with pytest.raises(InputRefused, match=r"s\.rows\.jsonl' is there already"):
        select(*asked[:2], tmp_path / "s.yaml")
    assert not (tmp_path / "s.yaml").exists()
    train(load_recipe(tmp_path / "r.yaml", (f"output={tmp_path / 'run'}", "train.steps=2")))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_likeness_is_the_cosine_of_whole_updates_whatever_the_factors() -> None:
    torch.manual_seed(0)
    A, B = torch.randn(3, 9), torch.randn(7, 3)
    turn = torch.linalg.qr(torch.randn(3, 3))[0]
    other = torch.randn(2, 9), torch.randn(7, 2)
    pairs = [(A, B), (turn @ A, -B @ turn.T), other]
    loras = [TrainedLora(Path("a"), len(pair[0]), 2.0, {"q": pair}) for pair in pairs]
    found = likeness(loras)
    whole = torch.nn.functional.cosine_similarity((B @ A).flatten(), (other[1] @ other[0]).flatten(), dim=0).abs()
    assert float(found[0, 1]) == pytest.approx(1) and float(found[0, 2]) == pytest.approx(float(whole), rel=1e-5)


def test_of_two_good_ones_the_less_alike_is_kept() -> None:
    candidates = [Candidate(name, accuracy, 1.0) for name, accuracy in (("a", 0.9), ("b", 0.8), ("c", 0.7), ("d", 0.1))]
    alike = torch.eye(4)
    alike[0, 1] = alike[1, 0] = 0.5
    base = Candidate("base", 0.2, 1.0)
    assert chosen_of(candidates, base, alike, 2, 1.0).numbers == [0, 2]
    # Where likeness costs nothing the scores alone decide; whoever is worse than the base is never chosen.
    assert chosen_of(candidates, base, alike, 2, 0.0).numbers == [0, 1]
    assert chosen_of(candidates, base, alike, 4, 0.0).numbers == [0, 1, 2]


def test_rows_are_taken_by_nearness_and_near_copies_are_passed_over() -> None:
    few = torch.tensor([[10.0, 0.0, 1.0], [10.0, 1.0, 0.0]])
    pool = torch.tensor([[-10.0, 0.0, 0.0], [9.0, 4.0, 8.0], [9.0, 4.0, 8.1], [9.0, -9.0, 0.0], [-9.0, 1.0, -9.0]])
    assert near_and_new(pool, few, 2) == [1, 3]


def test_a_bank_without_a_lora_of_the_base_is_refused(folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(folder / "my.yaml")
    with pytest.raises(InputRefused, match="no folder of it holds an adapter"):
        select(recipe, SelectOptions(tmp_path), tmp_path / "out.yaml")
    tiny.save_base(tmp_path / "other")
    changed = recipe.model_copy(update={"base": recipe.base.model_copy(update={"model": str(tmp_path / "other")})})
    with pytest.raises(InputRefused, match=r"the recipe's base is .*other, the adapters'"):
        select(changed, SelectOptions(folder / "bank"), tmp_path / "out.yaml")
    assert not list(tmp_path.glob("out*"))
