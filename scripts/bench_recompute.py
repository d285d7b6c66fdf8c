"""How much faster is a step that recomputes no layer, and what do lean norms and products cost? True 7B shapes.

    python scripts/bench_recompute.py [--layers 2] [--tokens 128] [--device cuda] [--repeats 7] [--out FILE]

The same D2MoRA (M3 N8 r8 on q, k, v, up, down) on the same NF4 weights, forward and backward, AdamW on the adapters:
once with every layer recomputed in the backward pass, once with none, and once so with transformers' own norms and
MLPs, which keep more. Seconds are the processor's on a CPU, on one
thread, so that a busy machine does not count; on a GPU they are those of the clock. A CPU's ratio is no GPU's.
"""

import argparse
from dataclasses import replace
from typing import Any

import torch
from bench_parts import context, peak_bytes, ratio, report, round_robin, size, summary, time_columns, worked
from bench_step import TARGETS, stepper

from qd2mora.base import SHAPES, random_base
from qd2mora.memory.lean import make_lean
from qd2mora.mixture import MixtureConfig, add_adapter
from qd2mora.recipe import Base


def become(kinds: dict[Any, type]) -> None:
    """Give modules their classes."""
    for module, kind in kinds.items():
        module.__class__ = kind


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = replace(SHAPES["llama-7b"], layers=options.layers, vocab=512)
    base = Base.model_validate({"model": "random:llama-7b", "compute_dtype": str(dtype).removeprefix("torch.")})
    config = MixtureConfig(
        method="d2mora", rank=8, down={"experts": 3}, up={"experts": 8}, target_modules=TARGETS["qkvud"]
    )
    whole: Any = random_base(shape, base, device)
    model: Any = add_adapter(whole, config, seed=0).to(device)
    x = torch.randn(1, options.tokens, shape.hidden, device=device, dtype=dtype)
    step = stepper(model.base_model.model.model, x, torch.randn_like(x))

    def recomputing() -> None:
        for layer in whole.model.layers:
            layer.gradient_checkpointing = True
        step()

    def keeping() -> None:
        for layer in whole.model.layers:
            layer.gradient_checkpointing = False
        step()

    plain = {module: type(module) for module in whole.modules()}
    make_lean(whole)
    lean = {module: type(module) for module in plain}

    def keeping_more() -> None:
        become(plain)
        keeping()
        become(lean)

    runs = {"every layer recomputed": recomputing, "none": keeping, "none, as transformers keeps": keeping_more}
    times = (
        worked(runs, device, options.repeats) if device.type == "cpu" else round_robin(runs, device, options.repeats)
    )
    peaks = {name: peak_bytes(run, device) for name, run in runs.items()}
    found = summary(times)
    result = {
        "bench": "recompute",
        **context(device, vars(options)),
        "seconds": "of the processor, one thread" if device.type == "cpu" else "of the clock",
        "times": found,
        "peak_bytes": peaks,
        "ratios": {
            "recomputed_per_kept": ratio(times, "every layer recomputed", "none"),
            "lean_per_transformers": ratio(times, "none", "none, as transformers keeps"),
        },
    }
    columns = time_columns(found, "none") | {"peak MiB": {name: size(value, "MiB") for name, value in peaks.items()}}
    report(result, columns, options.out)


if __name__ == "__main__":
    main()
