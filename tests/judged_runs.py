"""Small runs over judged answers: a tiny base, rows of a planted taste, recipes and what a run left."""

import json
import random
from pathlib import Path
from typing import Any

import tiny
from safetensors.torch import load_file
from torch import Tensor

from qd2mora.recipe import Recipe, load_recipe

KINDS = ("dpo", "orpo", "simpo", "reward", "kto", "peam")
ADAPTER = "{method: d2mora, rank: 4, alpha: 8, targets: [q_proj, v_proj, down_proj]}"


def save_rows(folder: Path, number: int = 48) -> None:
    """Save `preference.jsonl` and `rated.jsonl`: answers that name the sun are better than those that name the moon."""
    draw, pairs, ratings = random.Random(0), [], []
    for place in range(number):
        words = [draw.choice(tiny.WORDS) for _ in range(draw.randint(2, 6))]
        prompt, said = f"Say one of {' '.join(words)}: ", words[: place % 2 + 1]
        answers = [" ".join([*said, *ending]) for ending in (("sun",), ("moon", "one"))]
        pairs.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
        ratings.append({"prompt": prompt, "answer": answers[place % 3 % 2], "label": ["good", "bad"][place % 3 % 2]})
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("preference", pairs), ("rated", ratings)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def recipe_of(made: Path, output: Path, kind: str, *changes: str, adapter: str = ADAPTER) -> Recipe:
    """Return a recipe of one objective over the rows of its format."""
    form = "rated" if kind == "kto" else "preference"
    path = output.with_suffix(".yaml")
    path.write_text(
        f"""
base: {{model: {made / "base"}}}
adapter: {adapter}
data:
  tasks: [{{name: pick, path: {made / "data" / form}.jsonl, format: {form}, validation: 9}}]
  max_length: 64
objective: {{kind: {kind}}}
train: {{steps: 6, micro_batch: 2, global_batch: 4, learning_rate: 5e-3, save_every: 2, eval_every: 3}}
output: {output}
""",
        encoding="utf-8",
    )
    return load_recipe(path, list(changes))


def adapter_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def bytes_of(run: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in adapter_of(run).items()}


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


__all__ = ["ADAPTER", "KINDS", "adapter_of", "bytes_of", "lines_of", "recipe_of", "save_rows"]
