"""What are learned weights worth when LoRAs of different tasks are put side by side? Held-out loss of CAT.

How: train two LoRAs on parts of a recipe's tasks, then `python scripts/bench_cat.py RUN RUN --recipe RECIPE --out FILE`
with the recipe of all tasks. Weights are learned from the average (1 / n) and from the sum (1 each); every adapter is
read back by PEFT on the recipe's base and measured on held-out rows that nothing was learned on.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_parts import context
from peft import PeftModel

from qd2mora.base import load_base, load_tokenizer
from qd2mora.composition import ComposeOptions, compose
from qd2mora.data import collate, prepare
from qd2mora.recipe import Recipe, load_recipe

ROWS_AT_ONCE = 16


def held_out_loss(recipe: Recipe, adapter: Path | None) -> dict[str, float]:
    """Return the loss a token on the held-out rows of every task, and over all of them."""
    tokenizer, model = load_tokenizer(recipe.base.model), load_base(recipe.base)
    adapted: Any = model if adapter is None else PeftModel.from_pretrained(model, str(adapter)).eval()
    losses, whole, tokens = {}, 0.0, 0
    tasks = prepare(recipe.data, tokenizer, recipe.train.seed)
    for name, task in zip([each.name for each in recipe.data.tasks], tasks, strict=True):
        summed, number = 0.0, 0
        rows = list(task.validation)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            batch = collate(rows[start : start + ROWS_AT_ONCE], tokenizer.pad_token_id)
            labelled = int((batch["labels"][:, 1:] != -100).sum())
            known = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
            with torch.no_grad():
                summed, number = summed + float(adapted(**known).loss) * labelled, number + labelled
        losses[name] = summed / number
        whole, tokens = whole + summed, tokens + number
    return losses | {"all": whole / tokens}


def main() -> None:
    """Print one line for each way of weighing; write all of them to --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out")
    given = parser.parse_args()
    recipe, number = load_recipe(Path(given.recipe)), len(given.runs)
    ways = {"average": [1 / number] * number, "sum": [1.0] * number}
    found: dict[str, Any] = {"base": held_out_loss(recipe, None)}
    for run in given.runs:
        found[f"{Path(run).name} alone"] = held_out_loss(recipe, Path(run) / "adapter")
    with tempfile.TemporaryDirectory() as where:
        for name, weights in ways.items():
            for steps in (None, given.steps):
                out = Path(where) / f"{name}-{steps}"
                began = time.process_time()
                text = ",".join(map(str, weights))
                learn_on = None if steps is None else given.recipe
                made = compose("cat", given.runs, out, ComposeOptions(text, learn=learn_on, steps=steps))
                key = name if steps is None else f"{name}, {steps} steps"
                found[key] = held_out_loss(recipe, out) | {"cpu_seconds": time.process_time() - began}
                found[key] |= {"said": made.words}
    for name, each in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in each.items()), flush=True)
    if given.out is not None:
        about = context(torch.device("cpu"), {"steps": given.steps})
        Path(given.out).write_text(json.dumps(about | {"held_out_loss": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
