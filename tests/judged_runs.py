"""Small runs over judged answers: a tiny base, rows of a planted taste, recipes and what a run left."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
from safetensors.torch import load_file
from torch import Tensor

from qd2mora.objectives import objective_of
from qd2mora.recipe import Recipe, load_recipe

ADAPTER = "{method: d2mora, rank: 4, alpha: 8, targets: [q_proj, v_proj, down_proj]}"
OBJECTIVES = {kind: f"{{kind: {kind}}}" for kind in ("dpo", "orpo", "simpo", "reward", "kto", "peam")}
OBJECTIVES["experts"] = "{kind: reward, head: experts}"
OBJECTIVES["grpo"] = "{kind: grpo, rule: length, words: 3, samples: 4, max_new_tokens: 6, temperature: 2.0, kl: 0.1}"
KINDS = tuple(OBJECTIVES)
FORMS = {"kto": "rated", "grpo": "instruction"}
"""Formats of rows; `preference` elsewhere."""


def save_rows(folder: Path, number: int = 48) -> None:
    """Save `preference.jsonl` and `rated.jsonl`: answers that name the sun are better than those that name the moon.

    And `instruction.jsonl`: the same prompts with the better answers.
    """
    draw, pairs, ratings, right = random.Random(0), [], [], []
    for place in range(number):
        words = [draw.choice(tiny.WORDS) for _ in range(draw.randint(2, 6))]
        prompt, said = f"Say one of {' '.join(words)}: ", words[: place % 2 + 1]
        answers = [" ".join([*said, *ending]) for ending in (("sun",), ("moon", "one"))]
        pairs.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
        ratings.append({"prompt": prompt, "answer": answers[place % 3 % 2], "label": ["good", "bad"][place % 3 % 2]})
        right.append({"instruction": prompt, "output": answers[0]})
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("preference", pairs), ("rated", ratings), ("instruction", right)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def recipe_of(made: Path, output: Path, kind: str, *changes: str, adapter: str | None = None) -> Recipe:
    """Return a recipe of one objective over the rows of its format."""
    form = FORMS.get(kind, "preference")
    start = f"{{start: {made / 'inner'}}}" if kind == "experts" else ADAPTER
    task = f"{{name: pick, path: {made / 'data' / form}.jsonl, format: {form}, validation: 9}}"
    return recipe_over(made, output, [task], OBJECTIVES[kind], adapter or start, changes)


def inner_of(made: Path) -> Recipe:
    """Return the recipe of the run that a head over `experts` goes on from: two tasks, of an expert each."""
    rows = f"path: {made / 'data' / 'preference.jsonl'}, format: preference, validation: 9"
    tasks = [f"{{name: {name}, {rows}}}" for name in ("pick", "choose")]
    adapter = ADAPTER.replace("d2mora", "peam")
    return recipe_over(made, made / "inner", tasks, OBJECTIVES["reward"], adapter, ["train.steps=3"])


def recipe_over(
    made: Path, output: Path, tasks: Sequence[str], objective: str, adapter: str, changes: Sequence[str]
) -> Recipe:
    """Return a recipe of an objective and an adapter over tasks, each a line of YAML."""
    path = output.with_suffix(".yaml")
    listed = "".join(f"\n    - {task}" for task in tasks)
    path.write_text(
        f"""
base: {{model: {made / "base"}}}
adapter: {adapter}
data:
  tasks:{listed}
  max_length: 64
objective: {objective}
train: {{steps: 6, micro_batch: 2, global_batch: 4, learning_rate: 5e-3, save_every: 2, eval_every: 3}}
output: {output}
""",
        encoding="utf-8",
    )
    return load_recipe(path, list(changes))


def measured_of(recipe: Recipe) -> str:
    """Return the number that says how well a run of this objective does: of given answers, or of its own."""
    return "accuracy" if "accuracy" in objective_of(recipe.objective).names else "reward"


def adapter_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def trained_of(run: Path) -> dict[str, Tensor]:
    """Return the adapter and the head beside it, where there is one."""
    head = run / "adapter" / "reward_head.safetensors"
    return adapter_of(run) | (load_file(head) if head.is_file() else {})


def bytes_of(run: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in trained_of(run).items()}


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


__all__ = [
    "ADAPTER",
    "KINDS",
    "OBJECTIVES",
    "adapter_of",
    "bytes_of",
    "inner_of",
    "lines_of",
    "measured_of",
    "recipe_of",
    "save_rows",
    "trained_of",
]
