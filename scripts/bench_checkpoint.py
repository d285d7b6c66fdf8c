"""What does a checkpoint cost the training? 34.7 million parameters (LLaMA-7B, D2MoRA on q, k, v), AdamW moments.

    python scripts/bench_checkpoint.py

The loop waits while the state is copied; the rest runs beside it. A save every 100 steps costs less than 1% of the time
where a step takes at least as long as one wait. No step of a 7B is faster than its arithmetic: forward and backward
through frozen weights are 4 operations a parameter and token. Processor time is told beside wall time, which is longer
on a busy machine. The numbers go to `scripts/results/checkpoint-cpu.json`.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from qd2mora.training.checkpoint import Saver
from qd2mora.training.progress import Progress
from qd2mora.training.updates import PlainUpdater

SHAPES = [(4, 16, 4096), (3, 4096, 16), (4, 4096), (3, 16)]
LINEARS = 73
"""Of these shapes, 34.7 million parameters."""
TIMES = 5
OPERATIONS = 4 * 6.6e9
"""Of LLaMA-7B for a token."""
PEAKS = {"RTX 4090": 165e12, "A100": 312e12}
"""Dense bf16 operations a second, from the vendor's data sheets."""
TOKENS = 16 * 512
RESULT = Path(__file__).parent / "results" / "checkpoint-cpu.json"


def main() -> None:
    """Save a few times and print."""
    torch.set_num_threads(1)
    parameters = {f"{n}.{k}": nn.Parameter(torch.randn(s)) for n in range(LINEARS) for k, s in enumerate(SHAPES)}
    optimizer = torch.optim.AdamW(parameters.values())
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    waits, waits_cpu, wholes, wholes_cpu = [], [], [], []
    with tempfile.TemporaryDirectory() as folder, Saver(Path(folder), 2, PlainUpdater(parameters, optimizer)) as saver:
        for step in range(1, TIMES + 1):
            began, began_cpu, began_all = time.perf_counter(), time.thread_time(), time.process_time()
            saver.begin(Progress(step=step, applied=step))
            waits.append(time.perf_counter() - began)
            waits_cpu.append(time.thread_time() - began_cpu)
            saver.finish()
            wholes.append(time.perf_counter() - began)
            wholes_cpu.append(time.process_time() - began_all)
        size = sum(path.stat().st_size for path in (Path(folder) / f"step-{TIMES}").iterdir())
    wait_s = statistics.median(waits)
    floors = {device: OPERATIONS * TOKENS / peak for device, peak in PEAKS.items()}
    numbers = {
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "bytes": size,
        "wait_s": round(wait_s, 3),
        "wait_cpu_s": round(statistics.median(waits_cpu), 3),
        "whole_s": round(statistics.median(wholes), 3),
        "whole_cpu_s": round(statistics.median(wholes_cpu), 3),
        "least_step_s_for_1_percent": round(wait_s, 3),
        "tokens_a_step": TOKENS,
        "fastest_possible_7b_step_s": {device: round(floor, 2) for device, floor in floors.items()},
        "most_percent_of_training": {device: round(wait_s / floor, 2) for device, floor in floors.items()},
        "command": "python scripts/bench_checkpoint.py",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "device": f"{platform.machine()} CPU, 1 thread",
    }
    RESULT.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    print(f"the loop waits {numbers['wait_s']} s; the save has ended after {numbers['whole_s']} s")
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
