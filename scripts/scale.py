"""What do 8, 64 and 512 GPUs cost in communication, when only adapters are summed? From the ledger; nothing is run.

    python scripts/scale.py [--micro-tokens 8192] [--tokens-per-s 3000] [--out scripts/results/scale.json]

Bytes of a step and process: the loop's own all-reduce of float32 adapter gradients, 2 (P - 1) / P times their size over
the slowest link (a ring), and with ZeRO-2 a reduce-scatter and an all-gather of as much again. For comparison the same
for all weights in 16 bits, as full fine-tuning sums them. The time of a step is an assumption of the command line
(tokens of a process in a step, over tokens a second), and so is the link (GB/s of a process, microseconds of a hop). It
is a model to plan with, not a measurement.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from qd2mora.memory import plan
from qd2mora.recipe import parse_recipe

SHAPES = ("llama2-7b", "llama2-13b", "llama3-8b")
PROCESSES = (8, 64, 512)
ALL_WEIGHTS = {"llama2-7b": 6.74e9, "llama2-13b": 13.02e9, "llama3-8b": 8.03e9}
LINKS = {"NVLink, one node": (200.0, 3.0), "InfiniBand 400 Gb/s": (40.0, 6.0), "Ethernet 25 Gb/s": (2.5, 30.0)}
"""Usable GB/s of a process, and microseconds of a hop."""
BUCKET_BYTES = 32 << 20
GPUS_OF_A_NODE = 8


def trainable(shape: str) -> int:
    """Return the parameters of D2MoRA (M4 N3 r16 on q, k, v) on a shape."""
    content = {
        "base": {"model": f"random:{shape}"},
        "adapter": {"method": "d2mora"},
        "data": {"tasks": [{"name": "any", "path": "any.jsonl"}], "max_length": 512},
        "train": {"steps": 1, "optimizer": "adamw"},
        "output": "runs/any",
    }
    return plan(parse_recipe(content)).trainable_parameters


def ring_s(size: float, processes: int, gb_per_s: float, hop_us: float) -> float:
    """Return the seconds of a ring all-reduce: every byte passes twice, each bucket takes 2 (P - 1) hops."""
    buckets = math.ceil(size / BUCKET_BYTES)
    moved = 2 * (processes - 1) / processes * size
    return moved / (gb_per_s * 1e9) + buckets * 2 * (processes - 1) * hop_us * 1e-6


def row(shape: str, processes: int, link: str, step_s: float) -> dict[str, Any]:
    """Return one line of the table."""
    count = trainable(shape)
    adapters, weights = 4 * count, 2 * ALL_WEIGHTS[shape]
    speed, hop = LINKS[link]
    adapter_s, full_s = ring_s(adapters, processes, speed, hop), ring_s(weights, processes, speed, hop)
    moments = 8 * count
    return {
        "shape": shape,
        "gpus": processes,
        "link": link,
        "trainable": count,
        "sent_mib": round(2 * (processes - 1) / processes * adapters / 2**20, 1),
        "sum_s": round(adapter_s, 4),
        "share_of_step": round(adapter_s / (adapter_s + step_s), 4),
        "share_of_step_zero2": round(2 * adapter_s / (2 * adapter_s + step_s), 4),
        "share_of_step_full_fine_tuning": round(full_s / (full_s + step_s), 4),
        "moments_mib_each": round(moments / 2**20, 1),
        "moments_mib_each_zero2": round(moments / processes / 2**20, 2),
    }


def main() -> None:
    """Print the table; write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-tokens", type=int, default=8192, help="tokens of a process in a step")
    parser.add_argument("--tokens-per-s", type=float, default=3000.0, help="assumed speed of one GPU")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    step_s = arguments.micro_tokens / arguments.tokens_per_s
    cells = [(processes, link) for processes in PROCESSES for link in LINKS]
    # NVLink ends at the node.
    cells = [(count, link) for count, link in cells if count <= GPUS_OF_A_NODE or not link.startswith("NVLink")]
    rows = [row(shape, count, link, step_s) for shape in SHAPES for count, link in cells]
    for line in rows:
        print(
            f"{line['shape']:11} {line['gpus']:4} GPUs  {line['link']:20} {line['sent_mib']:7.1f} MiB sent  "
            f"{1e3 * line['sum_s']:8.1f} ms  {line['share_of_step']:6.1%} of a step (ZeRO-2 "
            f"{line['share_of_step_zero2']:.1%}, full fine-tuning {line['share_of_step_full_fine_tuning']:.1%})"
        )
    result = {"assumed": {"step_s": step_s, "links": LINKS, "bucket_bytes": BUCKET_BYTES}, "rows": rows}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
