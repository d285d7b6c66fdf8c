"""Does a true 7B train on a machine without a GPU, survive being killed, and stay within 6 GiB?

    python scripts/prove_7b.py [--out FILE] [--shape llama2-7b]

Random weights of the shape, quantised layer by layer to NF4; D2MoRA (M3 N8 r8) on q, k, v; three steps of 64 tokens.
The process is killed without warning once step 2 is saved, and a second one resumes. Peak resident memory of each
whole process is read from the system, and what it was when the base was loaded. Resident memory is printed every half
minute. A shape has no tokenizer, so a small one of made-up words stands in.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_parts import context

from qd2mora.base import is_nf4

LIMIT_GIB = 6.0
TOLD_EVERY_S = 30.0
LOADED = "loaded.json"


def recipe_of(folder: Path, shape: str) -> dict[str, Any]:
    """Return the recipe as a mapping."""
    return {
        "base": {"model": f"random:{shape}"},
        "adapter": {
            "method": "d2mora",
            "rank": 8,
            "targets": ["q_proj", "k_proj", "v_proj"],
            "down": {"experts": 3},
            "up": {"experts": 8},
        },
        "data": {"tasks": [{"name": "words", "path": str(folder / "words.jsonl")}], "max_length": 64},
        "train": {"steps": 3, "global_batch": 1, "optimizer": "adamw_8bit", "save_every": 1, "eval_every": 3},
        "memory": {"checkpointing": "on"},
        "output": str(folder / "run"),
    }


def write_rows(folder: Path) -> None:
    """Write rows that are cut at 64 tokens."""
    words = " ".join(f"w{number}" for number in range(60))
    rows = [{"instruction": f"w{number}", "output": words} for number in range(4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "words.jsonl").write_text(text, encoding="utf-8")


def tokenizer() -> Any:
    """Return a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", "<pad>", *(f"w{number}" for number in range(60))]
    made = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def resident(pid: int | str) -> dict[str, float]:
    """Return a process's resident memory, now and at its highest, in GiB; zeros where it is gone."""
    found = {"VmRSS": 0.0, "VmHWM": 0.0}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key in found:
                found[key] = round(int(value.split()[0]) / 2**20, 3)
    return found


def bytes_of(base: Any) -> int:
    """Return the bytes of a base: weights and what 4-bit ones are unpacked with."""
    states = [module.weight.quant_state for module in base.modules() if is_nf4(module)]
    packed = [tensor for state in states for tensor in state.as_dict(packed=True).values()]
    return sum(tensor.nbytes for tensor in (*base.parameters(), *packed))


def run_child(folder: Path, shape: str, resume: bool) -> None:
    """Train in this process."""
    from qd2mora.recipe import parse_recipe
    from qd2mora.training import run as training

    load_base = training.load_base

    def loaded(*args: Any, **settings: Any) -> Any:
        before, began = resident("self"), time.monotonic()
        base = load_base(*args, **settings)
        numbers = {
            "load_s": round(time.monotonic() - began),
            "before_load_gib": before["VmRSS"],
            "load_peak_gib": resident("self")["VmHWM"],
            "base_gib": round(bytes_of(base) / 2**30, 3),
        }
        (folder / LOADED).write_text(json.dumps(numbers), encoding="utf-8")
        print("loaded:", numbers, flush=True)
        return base

    training.load_base = loaded
    training.load_tokenizer = lambda model: tokenizer()
    training.train(parse_recipe(recipe_of(folder, shape)), resume=resume)


def watch(folder: Path, shape: str, resume: bool) -> dict[str, Any]:
    """Run a child, kill it after step 2 unless it resumes; return its exit code, seconds and peak resident GiB."""
    command = [sys.executable, __file__, "--child", str(folder), "--shape", shape, *(["--resume"] if resume else [])]
    began, child = time.monotonic(), subprocess.Popen(command)
    is_killed, told = False, began
    while True:
        # wait4 and not poll: it tells what this child took, and the library would take its end for itself.
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        if not (resume or is_killed) and (folder / "run" / "checkpoints" / "step-2" / "manifest.json").exists():
            os.kill(child.pid, signal.SIGKILL)
            is_killed = True
        if time.monotonic() - told >= TOLD_EVERY_S:
            told = time.monotonic()
            print(f"{told - began:.0f} s: {resident(child.pid)}", flush=True)
        time.sleep(0.2)
    child.returncode = os.waitstatus_to_exitcode(status)
    return {
        **json.loads((folder / LOADED).read_text(encoding="utf-8")),
        "cpu_s": round(usage.ru_utime + usage.ru_stime),
        "exit": child.returncode,
        "seconds": round(time.monotonic() - began),
        "peak_gib": round(usage.ru_maxrss * 1024 / 2**30, 3),
    }


def main() -> None:
    """Prove it; exit 1 where it does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shape", default="llama2-7b")
    parser.add_argument("--child", type=Path)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    if args.child:
        run_child(args.child, args.shape, args.resume)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder)
        killed, resumed = (watch(folder, args.shape, resume) for resume in (False, True))
        lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [row for row in map(json.loads, lines) if "loss" in row and "grad_norm" in row]
        trained = (folder / "run" / "adapter" / "adapter_model.safetensors").exists()
    peak = max(part["peak_gib"] for part in (killed, resumed))
    result = {
        "shape": args.shape,
        **context(torch.device("cpu"), {}),
        "cores": os.cpu_count(),
        "killed": killed,
        "resumed": resumed,
        "losses": [[row["step"], row["loss"]] for row in steps],
        "peak_gib": round(peak, 3),
        "holds": trained and killed["exit"] == -signal.SIGKILL and resumed["exit"] == 0 and 0 < peak <= LIMIT_GIB,
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(not result["holds"])


if __name__ == "__main__":
    main()
