"""Runs and suite files to ask, made on the spot."""

import json
from pathlib import Path

import tiny

from qd2mora.recipe import load_recipe
from qd2mora.training import train

LABELS = {
    "boolq": ("true", "false"),
    "social_i_qa": ("answer1", "answer2", "answer3"),
}


def save_run(folder: Path, name: str, *overrides: str, method: str = "d2mora") -> Path:
    """Train a run of three steps, whose adapter says something; the base and the data lie beside it."""
    if not (folder / "base").is_dir():
        tiny.save_base(folder / "base")
        tiny.save_tasks(folder / "data")
    if (folder / name / "adapter").is_dir():  # another test has made it
        return folder / name
    path = folder / f"{name}.yaml"
    path.write_text(tiny.recipe_text(folder / "base", folder / "data", folder / name, method=method), encoding="utf-8")
    settings = ("train.steps=3", "train.learning_rate=1e-2", "train.eval_every=3", *overrides)
    train(load_recipe(path, settings))
    return folder / name


def save_suite(folder: Path, number: int = 6) -> Path:
    """Write two tasks' test files in the published form; the last row of the second offers two answers only."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, labels in LABELS.items():
        rows = []
        for place in range(number):
            offered = labels[:2] if place == number - 1 else labels
            label = offered[place % len(offered)]
            question = f"Please answer: {' '.join(tiny.WORDS[: place % 5 + 1])}\n\nAnswer format: {'/'.join(offered)}"
            rows.append(
                {"instruction": question, "input": "", "output": f"the correct answer is {label}", "answer": label}
            )
        (folder / f"{file}.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder
