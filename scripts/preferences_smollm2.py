"""Does dpo on real pairs teach a real model to choose? Right against wrong answers, from a run that learned the right.

What: makes pairs of two commonsense tasks (a question; the right answer's text, a wrong one's), trains the right ones
for some steps, then `objective: dpo` from that run, and asks base, first and second run the same held-out pairs: is the
right text likelier a token than the wrong one? By hand: `qd2mora train sft.yaml`, `train dpo.yaml`, `eval --recipe`.
Why: a loss that falls on planted pairs says that the code works; whether choices get better is asked of real ones.
How: `python scripts/get_smollm2.py`, then `python scripts/preferences_smollm2.py DATA --base FILE --out FOLDER --result
FILE`; the same command goes on after a kill. An hour or so of one core.
"""

import argparse
import gzip
import importlib.metadata
import json
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from random import Random

import numpy as np

from qd2mora.disk.durable import write_atomically, write_json
from qd2mora.recipe.yaml_file import dump_yaml

TASKS = {"obqa": "openbookqa", "arc_e": "ARC-Easy"}
_ASKED = re.compile(r"question: (.*?)\s*(Answer1: .*?)\s*Answer format", re.DOTALL)


def pairs(rows: list[dict[str, str]], number: int, seed: str) -> list[dict[str, str]]:
    """Return so many rows as prompt, the right answer's text, and a wrong one's."""
    draw, made = Random(seed), []
    for row in rows:
        question, options = _ASKED.search(row["instruction"]).groups()  # type: ignore[union-attr]
        texts = [text.strip() for text in re.split(r"Answer\d: ", options)[1:]]
        right = texts.pop(int(row["answer"].removeprefix("answer")) - 1)
        wrong = [text for text in texts if text and text != right]
        if right and wrong:
            prompt = f"Question: {question}\nAnswer:"
            made.append({"prompt": prompt, "chosen": f" {right}", "rejected": f" {draw.choice(wrong)}"})
    draw.shuffle(made)
    return made[:number]


def write_pairs(data: Path, folder: Path, learned: int, asked: int) -> None:
    """Write pairs to learn from and pairs to ask, of other rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, name in TASKS.items():
        with gzip.open(data / "commonsense" / "train" / f"{name}.json.gz", "rt", encoding="utf-8") as file:
            learn = pairs(json.load(file), learned, task)
        test = json.loads((data / "commonsense" / "test_500" / f"{name}.json").read_text(encoding="utf-8"))
        for part, rows in (("learn", learn), ("ask", pairs(test, asked, task))):
            write_atomically(folder / f"{task}.{part}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def recipe(given: argparse.Namespace, name: str) -> dict[str, object]:
    """Return the recipe of a run: `sft`, `dpo` from it, or `choices`, whose objective needs no reference."""
    tasks = [
        {
            "name": task,
            "path": f"rows/{task}.learn.jsonl",
            "validation": f"rows/{task}.ask.jsonl",
            **_format(name),
            "weight": 1.0,
        }
        for task in TASKS
    ]
    adapter: dict[str, object] = {"method": "d2mora", "rank": 8, "alpha": 16, "targets": ["q_proj", "k_proj", "v_proj"]}
    if name == "dpo":
        adapter = {"start": str((given.out / "sft").resolve())}
    steps = given.steps if name == "dpo" else given.sft_steps
    train = {
        **{"steps": steps, "micro_batch": 8, "global_batch": 8, "schedule": "linear", "warmup_steps": steps // 10},
        **{"learning_rate": given.rate if name == "dpo" else 1e-3, "save_every": 20, "eval_every": steps},
    }
    kinds = {"sft": "sft", "dpo": "dpo", "choices": "orpo"}
    return {
        "base": {"model": str(given.base.resolve()), "quantization": "nf4", "compute_dtype": "float32"},
        "adapter": adapter,
        "data": {"tasks": tasks, "max_length": 128, "on_bad_row": "skip"},
        "objective": {"kind": kinds[name]},
        "train": train,
        "output": str((given.out / name).resolve()),
    }


def _format(name: str) -> dict[str, object]:
    if name == "sft":
        return {"format": "completion", "fields": {"prompt": "prompt", "completion": "chosen"}}
    return {"format": "preference"}


def run(*words: str) -> None:
    """Run a command of this package; end where it fails."""
    print("+ qd2mora", *words, flush=True)
    code = subprocess.run([sys.executable, "-m", "qd2mora", *words], check=False).returncode
    if code:
        sys.exit(code)


def against(folder: Path, one: str, other: str) -> dict[str, dict[str, float | list[float]]]:
    """Return how much more of margin and accuracy `one` has than `other` on the same pairs, 95% bootstrap."""
    margins: list[list[float]] = [[], []]
    values: list[list[float]] = [[], []]
    for place, name in enumerate((one, other)):
        lines = (folder / f"{name}.rows.jsonl").read_text(encoding="utf-8").splitlines()[1:]
        for row in sorted(map(json.loads, lines), key=lambda row: (row["task"], row["row"])):
            margins[place].append(row["margin"])
            values[place].append(row["value"])
    found: dict[str, dict[str, float | list[float]]] = {}
    for name, (ours, theirs) in {"margin": margins, "accuracy": values}.items():
        apart = np.array(ours) - np.array(theirs)
        drawn = np.random.default_rng(0).choice(apart, (10_000, len(apart))).mean(1)
        found[name] = {"difference": float(apart.mean()), "interval": np.quantile(drawn, [0.025, 0.975]).tolist()}
    return found


def main() -> None:
    """Make pairs, train twice, ask three models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the real data: commonsense/train, commonsense/test_500")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into, or to go on in")
    parser.add_argument("--sft-steps", type=int, default=40)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--learned", type=int, default=800, help="pairs a task to learn from")
    parser.add_argument("--asked", type=int, default=200, help="pairs a task to ask")
    parser.add_argument("--result", type=Path)
    given = parser.parse_args()
    write_pairs(given.data, given.out / "rows", given.learned, given.asked)
    for name in ("sft", "dpo", "choices"):
        write_atomically(given.out / f"{name}.yaml", dump_yaml(recipe(given, name)))
    for name in ("sft", "dpo"):
        if not (given.out / name / "adapter" / "adapter_model.safetensors").is_file():
            resumed = ["--resume"] if (given.out / name).exists() else []
            run("train", str(given.out / f"{name}.yaml"), *resumed)
    scores = {}
    for name, subject in (("base", given.base), ("sft", given.out / "sft"), ("dpo", given.out / "dpo")):
        out = given.out / f"{name}.json"
        if not out.is_file():
            run("eval", str(subject), "--recipe", str(given.out / "choices.yaml"), "--out", str(out))
        scores[name] = json.loads(out.read_text(encoding="utf-8"))
    lines = [
        json.loads(line) for line in (given.out / "dpo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    measured = {
        "choices": scores,
        "dpo minus sft": against(given.out, "dpo", "sft"),
        "dpo": [line["eval_measures"] | {"step": line["step"]} for line in lines if "eval_measures" in line],
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "device": "cpu",
        "date": date.today().isoformat(),
        "command": " ".join(Path(word).name if "/" in word else word for word in sys.argv),
    }
    if given.result:
        write_json(given.result, measured)
    print(json.dumps(measured["dpo minus sft"]))


if __name__ == "__main__":
    main()
