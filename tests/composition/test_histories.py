"""Histories as vectors: what is asked chooses the long part, the latest items are the short one, later rows agree."""

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch

from qd2mora.cli import main
from qd2mora.composition.histories import HistoryOptions, fitted, parts_of_history
from qd2mora.errors import InputRefused
from qd2mora.recipe import load_recipe
from qd2mora.training import train

ASKED = ["red sun", "cat dog", "one two", "green moon"]


def test_the_long_part_is_what_is_near_to_the_question_and_the_short_one_what_came_last() -> None:
    items = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.0, -1.0]]).double()
    long, short = parts_of_history(torch.tensor([1.0, 0.0]).double(), items, HistoryOptions(long=2, short=2))
    torch.testing.assert_close(long, torch.tensor([0.8, 0.4]).double())  # items 0 and 2
    torch.testing.assert_close(short, torch.tensor([0.3, -0.1]).double())  # items 2 and 3
    # Another question, another long part, the same short one.
    other = parts_of_history(torch.tensor([0.0, -1.0]).double(), items, HistoryOptions(long=1, short=2))
    torch.testing.assert_close(other[0], items[3])
    torch.testing.assert_close(other[1], short)


def test_directions_hold_what_rows_differ_in_and_no_more_are_given_than_there_are() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(12, 2, generator=generator).double() @ torch.randn(2, 9, generator=generator).double() + 5
    basis, kept = fitted(parts, 2)
    assert kept == pytest.approx(1)
    vectors = basis.vectors(parts, torch.ones(12).bool())
    torch.testing.assert_close(torch.cdist(vectors, vectors) * basis.scale, torch.cdist(parts, parts))
    assert float(vectors.square().mean()) == pytest.approx(1)
    with pytest.raises(InputRefused, match=r"--width: 3 will not do: .* differ in 2 directions"):
        fitted(parts, 3)


def row(asked: str, history: list[str]) -> dict[str, object]:
    return {"instruction": asked, "input": "", "output": "red", "history": history}


def save_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


def vectors_of(path: Path) -> torch.Tensor:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all("history" not in each for each in rows)
    return torch.tensor([each["vector"] for each in rows])


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["qd2mora", "histories", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)


def test_users_are_told_apart_by_their_history_and_later_rows_get_the_same_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.save_base(tmp_path / "base")
    likes = (["red blue", "green red", "blue"], ["cat", "dog bird", "bird cat dog"])
    rows = [row(asked, history) for asked in ASKED for history in likes]
    data = save_rows(tmp_path / "rows.jsonl", [*rows, row("sun", [])])
    recipe, out = tmp_path / "my.yaml", tmp_path / "vectors.jsonl"
    recipe.write_text(
        f"base: {{model: {tmp_path / 'base'}, quantization: none}}\n"
        "adapter: {method: reclora, rank: 2, targets: [q_proj], external_width: 3}\n"
        f"data: {{tasks: [{{name: task, path: {out}, vector: vector}}], max_length: 128}}\n"
        "train: {steps: 1, micro_batch: 4, global_batch: 4}\n"
        f"output: {tmp_path / 'run'}\n",
        encoding="utf-8",
    )
    run(monkeypatch, recipe, data, "--width", 3, "--long", 2, "--short", 2, "--out", out)
    told = capsys.readouterr().out
    assert "9 rows with vectors of 3 numbers" in told and "1 without a history have zeros" in told
    found = vectors_of(out)
    assert not found[-1].any()
    one, other = found[:-1:2], found[1:-1:2]
    # Nearer to each other than to anybody of the other kind, whatever they ask.
    assert max(torch.pdist(one).max(), torch.pdist(other).max()) < torch.cdist(one, other).min()
    later, new = save_rows(tmp_path / "later.jsonl", rows[2:4]), tmp_path / "new.jsonl"
    basis = tmp_path / "vectors.basis.safetensors"
    run(monkeypatch, recipe, later, "--long", 2, "--short", 2, "--basis", basis, "--out", new)
    torch.testing.assert_close(vectors_of(new), found[2:4], atol=1e-4, rtol=1e-4)
    # A process that is killed between its two files leaves the directions: they stay, and the next try writes the rows.
    rows_before, basis_before = out.read_bytes(), basis.read_bytes()
    out.unlink()
    run(monkeypatch, recipe, data, "--width", 3, "--long", 2, "--short", 2, "--out", out)
    assert out.read_bytes() == rows_before and basis.read_bytes() == basis_before
    assert train(load_recipe(recipe)).steps == 1
    # Directions of other rows are somebody's: they are kept, and nothing is written beside them.
    out.unlink()
    given = ["histories", recipe, data, "--width", 1, "--out", out]
    monkeypatch.setattr(sys, "argv", ["qd2mora", *map(str, given)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and f"'{basis}' is there already" in capsys.readouterr().err
    assert basis.read_bytes() == basis_before and not out.exists()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row("sun", ["moon"])], "--width: 16 will not do: the histories of these rows differ in 0 directions"),
        ([{"instruction": "sun", "history": "moon"}], "row 1: field 'history' should be a list of texts"),
        ([{"prompt": "sun", "history": ["moon"]}], "row 1: no text in field 'instruction'"),
        ([row("sun", [])], "no row has anything in its field 'history'"),
    ],
)
def test_what_makes_no_vectors_is_said_in_one_line(
    rows: list[dict[str, object]],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny.save_base(tmp_path / "base")
    recipe = tmp_path / "my.yaml"
    text = tiny.recipe_text(tmp_path / "base", tmp_path, tmp_path / "run", method="lora")
    recipe.write_text(text, encoding="utf-8")
    out = tmp_path / "out.jsonl"
    given = [recipe, save_rows(tmp_path / "rows.jsonl", rows), "--out", out]
    monkeypatch.setattr(sys, "argv", ["qd2mora", "histories", *map(str, given)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and words in capsys.readouterr().err
    assert not out.exists()
