"""What does a checkpoint cost the training? 35.8 million parameters (LLaMA-7B, D2MoRA on q, k, v), AdamW moments.

    python scripts/bench_checkpoint.py

Prints the time that the loop waits (a copy is taken) and the time of the write beside it, and as the last line JSON.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from qd2mora.training.saver import Saver
from qd2mora.training.state import LocalState, Progress

SHAPES = [(4, 16, 4096), (3, 4096, 16), (4, 4096), (3, 16)]
LINEARS = 73
"""Of these shapes, 35.8 million parameters."""
TIMES = 5


def main() -> None:
    """Save a few times and print."""
    torch.set_num_threads(1)
    parameters = {f"{n}.{k}": nn.Parameter(torch.randn(s)) for n in range(LINEARS) for k, s in enumerate(SHAPES)}
    optimizer = torch.optim.AdamW(parameters.values())
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    waits, writes = [], []
    with tempfile.TemporaryDirectory() as folder, Saver(Path(folder), 2, LocalState(parameters, optimizer)) as saver:
        for step in range(1, TIMES + 1):
            began = time.perf_counter()
            saver.save(Progress(step=step, applied=step))
            waits.append(time.perf_counter() - began)
            saver.finish()
            writes.append(time.perf_counter() - began)
        size = sum(path.stat().st_size for path in (Path(folder) / f"step-{TIMES}").iterdir())
    numbers = {
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "bytes": size,
        "wait_s": round(statistics.median(waits), 3),
        "whole_s": round(statistics.median(writes), 3),
        # A save every 100 steps: below 1% of the time where a step takes at least as long as the loop waits.
        "least_step_s_for_1_percent": round(statistics.median(waits), 3),
        "torch": torch.__version__,
        "device": "cpu",
    }
    print(f"the loop waits {numbers['wait_s']} s; the save has ended after {numbers['whole_s']} s")
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
