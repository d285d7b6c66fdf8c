"""Continued pretraining: documents beside instructions, packed, mixed by tokens, judged by their loss."""

import json
from pathlib import Path

import tiny

from qd2mora import load_recipe, train
from qd2mora.evaluation import Exam, evaluate


def test_documents_train_beside_instructions_in_packed_lines_and_are_judged_by_their_loss(tmp_path: Path) -> None:
    tiny.save_base(tmp_path / "base")
    tiny.save_tasks(tmp_path / "data")
    lines = [json.dumps({"text": "red sun blue moon " * (number % 9 + 1)}) for number in range(30)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "book.txt").write_text("one two three cat dog\n" * 60, encoding="utf-8")
    recipe = f"""
base: {{model: {tmp_path / "base"}}}
adapter: {{method: d2mora, rank: 4, alpha: 8, targets: [q_proj, v_proj]}}
data:
  tasks:
    - {{name: texts, path: {tmp_path / "texts.jsonl"}, format: text, validation: 4, weight: 1}}
    - {{name: book, path: {tmp_path / "book.txt"}, format: text, weight: 1}}
    - {{name: first, path: {tmp_path / "data/first.jsonl"}, validation: 4, weight: 1}}
  mix: tokens
  packing: true
  max_length: 64
train: {{steps: 4, micro_batch: 2, global_batch: 8, learning_rate: 1.0e-2, eval_every: 2}}
output: {tmp_path / "run"}
"""
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    train(load_recipe(tmp_path / "recipe.yaml"))
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [entry["eval_loss"]["texts"] for entry in metrics if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    scores = evaluate(tmp_path / "run", Exam(recipe=load_recipe(tmp_path / "recipe.yaml")))
    assert scores["texts"].metric == "loss" and scores["first"].metric == "exact" and "book" not in scores
