"""What does one mixture cost beside one LoRA? Forward and backward of a single 4-bit linear, in one process.

    python scripts/bench_layer.py [--device cuda] [--tokens 512] [--width 4096] [--threads 2]
        [--dtype bfloat16] [--dropout 0.05] [--out FILE]

Compares, on the same NF4 weight: the bare base, this project's D2MoRA (M4 N3 r16) and other methods, PEFT's LoRA (r 64,
more parameters), and the loop over experts as the D2MoRA authors' layer runs it, written anew from the formula. Unless
--dtype says otherwise, on a CPU all is float32, on a GPU bfloat16 with adapters as PEFT keeps them. `work` are the CPU
seconds of one thread: on a shared machine they tell work from waiting. Prints a table and, last, one line of JSON.
"""

import argparse
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from bench_parts import (
    REPEATS,
    ExpertLoop,
    context,
    peak_bytes,
    ratio,
    report,
    round_robin,
    size,
    summary,
    time_columns,
    worked,
)
from torch import Tensor, nn

from qd2mora.mixture import MixtureConfig, MixtureLinear, Routing

LORA_RANK = 64
METHODS: dict[str, dict[str, Any]] = {
    "ours": {"method": "d2mora", "rank": 16, "alpha": 32, "down": {"experts": 4}, "up": {"experts": 3}},
    "ours: lora r64": {"method": "lora", "rank": LORA_RANK},
    "ours: hydralora N8 r12": {"method": "hydralora", "rank": 12, "up": {"experts": 8}},
    "ours: mola E4 k2 r8": {"method": "mola", "rank": 8, "allocation": "4"},
}
Module = Callable[[Tensor], Tensor]


class Holder(nn.Module):
    """A model of one linear, for PEFT to wrap."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def contenders(width: int, device: torch.device, dtype: torch.dtype, dropout: float) -> dict[str, Module]:
    """Build all on one weight; up experts are random, so that nothing is multiplied by zeros alone."""
    base = bnb.nn.Linear4bit(width, width, bias=False, compute_dtype=dtype, quant_type="nf4")
    weight = torch.randn(width, width, dtype=dtype) * 0.02
    base.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(device)
    base.support_avx512bf16_for_cpu = False
    found: dict[str, Module] = {"base": base}
    for name, settings in METHODS.items():
        layer = MixtureLinear(base, "default", MixtureConfig(**settings, dropout=dropout), Routing()).to(device).train()
        nn.init.normal_(layer.tensors("default")["mixture_B"], std=0.02)
        found[name] = layer
        if name == "ours":
            found["expert loop"] = ExpertLoop(layer, dropout)
    lora = peft.LoraConfig(
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        lora_dropout=dropout,
        target_modules=["linear"],
        init_lora_weights=False,
    )
    theirs: Any = peft.get_peft_model(Holder(base), lora).to(device)
    found["peft lora"] = theirs.base_model.model.linear
    return found


def saved_bytes(module: Module, x: Tensor) -> int:
    """Return the bytes kept for the backward pass beyond x and the parameters, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not (tensor.is_leaf and tensor.requires_grad) and storage.data_ptr() != x.untyped_storage().data_ptr():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(kept.values())


def work_ratios(work: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return ratios of CPU seconds."""
    if not work:
        return {}
    return {
        "work_ours_per_lora": ratio(work, "ours", "peft lora"),
        "work_loop_per_ours": ratio(work, "expert loop", "ours"),
        "work_ours_per_base": ratio(work, "ours", "base"),
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    modules = contenders(options.width, device, dtype, options.dropout)
    x = torch.randn(1, options.tokens, options.width, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)

    def runner(module: Module) -> Callable[[], None]:
        def run() -> None:
            module(x).backward(dy)
            x.grad = None

        return run

    runs = {name: runner(module) for name, module in modules.items()}
    times = round_robin(runs, device, options.repeats)
    found = summary(times)
    kept = {name: saved_bytes(module, x) for name, module in modules.items()}
    peaks = {name: peak_bytes(run, device) for name, run in runs.items()}
    work = worked(runs, device, options.repeats) if device.type == "cpu" else {}
    columns = time_columns(found, "base")
    columns |= {
        "work ms": {name: f"{1e3 * value['median_s']:.1f}" for name, value in summary(work).items()},
        "kept KiB": {name: size(value, "KiB") for name, value in kept.items()},
        "peak MiB": {name: size(value, "MiB") for name, value in peaks.items()},
    }
    result = {
        "bench": "layer",
        **context(device, vars(options)),
        "times": found,
        "work": summary(work),
        "saved_bytes": kept,
        "peak_bytes": peaks,
        "ratios": {
            "ours_per_lora": ratio(times, "ours", "peft lora"),
            "loop_per_ours": ratio(times, "expert loop", "ours"),
            "ours_per_base": ratio(times, "ours", "base"),
        }
        | work_ratios(work),
    }
    report(result, columns, options.out)


if __name__ == "__main__":
    main()
