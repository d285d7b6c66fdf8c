"""What does watching the routers add to an evaluation? Rows through a model with and without the watch.

python scripts/bench_inspection.py RUN [--rounds 9]

The run's own held-out rows, in turns, so that a busy machine slows both alike. What a linear adds does not grow with
its width beyond its product down, so that a small model shows the dearest case. Prints a table and one line of JSON.
"""

import argparse
import json
import platform
import statistics
import time
from contextlib import nullcontext

import torch

from qd2mora.data import collate, prepare
from qd2mora.inspection import RoutingWatch, routing_report
from qd2mora.inspection.finished_run import rows_to_watch
from qd2mora.memory.loss import labelled_states
from qd2mora.run_folder import open_run

ROWS_AT_ONCE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    opened = open_run(arguments.run)
    tasks = prepare(opened.recipe.data, opened.tokenizer, opened.recipe.train.seed)
    rows = sorted((row for task in tasks for row in rows_to_watch(task, 16)), key=lambda row: len(row.ids))
    parts = [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]
    batches = [collate(part, opened.tokenizer.pad_token_id) for part in parts]
    batches = [{name: tensor.to(opened.model.device) for name, tensor in batch.items()} for batch in batches]
    watch = RoutingWatch(opened.model, len(tasks))

    def seconds(is_watched: bool) -> float:
        began = time.perf_counter()
        with watch.watching() if is_watched else nullcontext(), torch.no_grad():
            for batch in batches:
                labelled_states(opened.model, batch)
        if opened.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds(True)
    pairs = [(seconds(False), seconds(True)) for _ in range(arguments.rounds)]
    plain, watched = (statistics.median(column) for column in zip(*pairs, strict=True))
    began = time.perf_counter()
    routing_report(watch, opened.model, [task.task.name for task in tasks], {}, None)
    report = time.perf_counter() - began
    device = torch.cuda.get_device_name() if opened.model.device.type == "cuda" else platform.processor() or "cpu"
    print(f"{len(watch.routers)} routers, {len(rows)} rows, on {device}, torch {torch.__version__}")
    print(f"plain {plain:.3f} s, watched {watched:.3f} s ({watched / plain - 1:+.0%}); the report {report:.2f} s")
    numbers = {"plain_s": plain, "watched_s": watched, "report_s": report, "rounds": pairs}
    print(json.dumps({"device": device, "torch": torch.__version__, "routers": len(watch.routers), **numbers}))


if __name__ == "__main__":
    main()
