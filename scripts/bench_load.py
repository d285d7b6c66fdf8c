"""What does a start cost: quantising a 16-bit base, or reading the 4-bit weights that an earlier start kept?

    python scripts/bench_load.py [--shape llama2-7b] [--layers N] [--times 3] [--folder DIR] [--out FILE]

A base of the shape is written once, bfloat16 in shards, of random numbers. Then three kinds of start, each in a process
of its own, in turn: `made` quantises it and keeps nothing, `first` quantises it and keeps the 4-bit weights, `kept`
reads those. `kept` hashes the 16-bit files and the kept ones besides, which tells whether they still belong together.
The files' pages are dropped before each start, so that all are read from the disk.

Seconds of `load_base` by the wall and by the processor, and the whole process's most resident memory against the bytes
of the loaded base, embeddings and head in the compute dtype included. On a CPU: no figure here is a GPU's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_parts import context
from prove_7b import bytes_of, resident
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from qd2mora.base import SHAPES, Shape, load_base
from qd2mora.recipe import Base

GIB = 2**30
SHARD_BYTES = GIB
MOST_RATIO, AIMED_RATIO, MOST_GIB_ABOVE = 0.5, 0.35, 1.5
KINDS = ("made", "first", "kept")


def write_base(folder: Path, shape: Shape) -> None:
    """Write random bfloat16 weights in shards, one of them in memory at a time."""
    config = shape.config()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    noise = torch.empty(1 << 24, dtype=torch.bfloat16).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    files: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    number = 0

    def finish_shard() -> None:
        path = folder / f"model-{number:05}.safetensors"
        save_file(shard, path, {"format": "pt"})
        files.update(dict.fromkeys(shard, path.name))

    for name, tensor in model.state_dict().items():
        if shard and sum(each.nbytes for each in shard.values()) + tensor.numel() * 2 > SHARD_BYTES:
            finish_shard()
            shard, number = {}, number + 1
        whole = noise.repeat(-(-tensor.numel() // noise.numel()))[: tensor.numel()].view(tensor.shape)
        shard[name] = torch.ones_like(whole) if whole.dim() == 1 else whole.clone()
    finish_shard()
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def drop_pages(folder: Path) -> None:
    """Have the files under a folder read from the disk the next time."""
    for path in folder.rglob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def run_child(folder: Path, kind: str) -> None:
    """Load in this process and print the numbers."""
    cache = "none" if kind == "made" else str(folder / "kept")
    before = resident("self")["VmRSS"]
    began, began_cpu = time.perf_counter(), time.process_time()
    model = load_base(
        Base(model=str(folder / "base"), cache=cache), torch.device("cpu"), keep_from=0 if kind == "first" else None
    )
    numbers = {
        "load_s": round(time.perf_counter() - began, 2),
        "load_cpu_s": round(time.process_time() - began_cpu, 2),
        "before_load_gib": before,
        "peak_gib": resident("self")["VmHWM"],
        "base_gib": round(bytes_of(model) / GIB, 3),
        "load_average": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(numbers), flush=True)


def start(folder: Path, kind: str) -> dict[str, Any]:
    """Run one start in a process of its own."""
    drop_pages(folder)
    command = [sys.executable, __file__, "--child", kind, "--folder", str(folder)]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    numbers: dict[str, Any] = json.loads(told.strip().splitlines()[-1])
    print(f"{kind}: {numbers}", flush=True)
    return numbers


def measured(folder: Path, times: int) -> dict[str, list[dict[str, Any]]]:
    """Return the numbers of each kind of start; `first` runs once."""
    starts: dict[str, list[dict[str, Any]]] = {"first": [start(folder, "first")], "made": [], "kept": []}
    for _ in range(times):
        for kind in ("made", "kept"):
            starts[kind].append(start(folder, kind))
    return starts


def main() -> None:
    """Measure; exit 1 where the limits do not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama2-7b", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="of the shape's; all of them without")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the base is written and left; without, a temporary one")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=KINDS)
    args = parser.parse_args()
    if args.child:
        run_child(args.folder, args.child)
        return
    shape = SHAPES[args.shape]
    shape = replace(shape, layers=args.layers or shape.layers)
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        if not (folder / "base").exists():
            (folder / "base").mkdir(parents=True)
            write_base(folder / "base", shape)
        on_disk = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        starts = measured(folder, args.times)
    median = {
        kind: {key: statistics.median(each[key] for each in found) for key in ("load_s", "load_cpu_s", "peak_gib")}
        for kind, found in starts.items()
    }
    above = {kind: round(max(e["peak_gib"] - e["base_gib"] for e in found), 3) for kind, found in starts.items()}
    ratio = round(median["kept"]["load_s"] / median["made"]["load_s"], 3)
    result = {
        "shape": args.shape,
        "layers": shape.layers,
        "bf16_gib": round(on_disk / GIB, 3),
        **context(torch.device("cpu"), {}),
        "cores": os.cpu_count(),
        "median": median,
        "peak_above_base_gib": above,
        "kept_over_made_wall": ratio,
        "kept_over_made_cpu": round(median["kept"]["load_cpu_s"] / median["made"]["load_cpu_s"], 3),
        "limits": {"kept_over_made": [MOST_RATIO, AIMED_RATIO], "peak_above_base_gib": MOST_GIB_ABOVE},
        "holds": ratio <= MOST_RATIO and max(above.values()) <= MOST_GIB_ABOVE,
        "starts": starts,
    }
    print(json.dumps({key: value for key, value in result.items() if key != "starts"}, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(not result["holds"])


if __name__ == "__main__":
    main()
