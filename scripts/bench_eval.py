"""How long does likelihood scoring of the eight commonsense test sets take?

    python scripts/bench_eval.py TESTS --model FOLDER [--limit 500] [--out scripts/results/eval-cpu.json]

TESTS is a folder of the suite's test files, FOLDER a run or a model. Every choice of every row is weighed; a prompt is
read once and its cache continued with each choice. Wall time is told beside processor time, since other work on the
machine lengthens the first alone. Accuracy of a model that small is chance. Prints JSON.
"""

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch

from qd2mora.evaluation import SUITES, Exam, ask_suite, open_subject, score_all


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tests", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=500, help="rows of each task")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    wishes = parser.parse_args()
    torch.set_num_threads(wishes.threads)
    subject = open_subject(wishes.model)
    by_task = {}
    for task in SUITES["commonsense"].tasks:
        began, used = time.perf_counter(), time.process_time()
        exam = Exam(None, "commonsense", wishes.tests, (task.name,), wishes.limit, "likelihood")
        (asked,) = ask_suite(exam, subject.tokenizer)
        score = score_all(subject, [asked])[task.name]
        by_task[task.name] = {
            "rows": score.rows,
            "tokens": sum(len(row.ids) for row in asked.rows),
            "choices": sum(map(len, asked.choices)),
            "s": round(time.perf_counter() - began, 1),
            "cpu_s": round(time.process_time() - used, 1),
            "score": score.mean,
        }
        print(task.name, by_task[task.name], flush=True)
    numbers = {
        name: round(sum(each[name] for each in by_task.values()), 1) for name in ("rows", "tokens", "s", "cpu_s")
    }
    about = {"model": wishes.model.name, "parameters": subject.plain.num_parameters(), "threads": wishes.threads}
    about |= {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "torch": version("torch")}
    content = {**about, **numbers, "tasks": by_task}
    if wishes.out:
        wishes.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content))


if __name__ == "__main__":
    main()
