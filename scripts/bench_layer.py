"""What does one mixture cost beside one LoRA? Forward and backward of a single 4-bit linear, in one process.

    python scripts/bench_layer.py [--device cuda] [--tokens 512] [--width 4096] [--threads 2]

Compares, on the same NF4 weight: the bare base, this project's D2MoRA (M4 N3 r16), PEFT's LoRA (r 64, more parameters),
and the loop over experts as the D2MoRA authors' layer runs it, written anew from the formula. Prints a table and, last,
one line of JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from qd2mora.mixture import MixtureConfig, MixtureLinear, Routing

REPEATS, WARM_UP = 20, 3
DOWN, UP, RANK, ALPHA, LORA_RANK = 4, 3, 16, 32, 64


class ExpertLoop(nn.Module):
    """The mixture as a loop: each up expert's full-width output is formed and weighed in float32."""

    def __init__(self, base: nn.Module, layer: MixtureLinear) -> None:
        super().__init__()
        self.base, self.layer = base, layer

    def forward(self, x: Tensor) -> Tensor:
        tensors = self.layer.tensors("default")
        gate_down = (x @ tensors["mixture_router_down"].to(x.dtype).T).float().softmax(-1)
        parts = [(x @ bank.to(x.dtype).T).float() for bank in tensors["mixture_A"]]
        z = sum(gate_down[..., i : i + 1] * part for i, part in enumerate(parts))
        gate_up = (z @ tensors["mixture_router_up"].float().T).softmax(-1)
        outs = [(z.to(x.dtype) @ bank.to(x.dtype).T).float() for bank in tensors["mixture_B"]]
        delta = sum(gate_up[..., j : j + 1] * out for j, out in enumerate(outs))
        return self.base(x) + (ALPHA / RANK * delta).to(x.dtype)


class Holder(nn.Module):
    """A model of one linear, for PEFT to wrap."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def contenders(width: int, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    """Build the four on one weight."""
    base = bnb.nn.Linear4bit(width, width, bias=False, compute_dtype=dtype, quant_type="nf4")
    weight = torch.randn(width, width, dtype=dtype) * 0.02
    base.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(device)
    base.support_avx512bf16_for_cpu = False
    config = MixtureConfig(method="d2mora", rank=RANK, alpha=ALPHA, down={"experts": DOWN}, up={"experts": UP})
    ours = MixtureLinear(base, "default", config, Routing()).to(device)
    lora = peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=["linear"])
    theirs: Any = peft.get_peft_model(Holder(base), lora).to(device)
    return {
        "base": base,
        "ours": ours,
        "peft lora": theirs.base_model.model.linear,
        "expert loop": ExpertLoop(base, ours),
    }


def measure(module: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[float, int]:
    """Return seconds and peak bytes (CUDA only) of one forward and backward."""
    on_gpu = x.is_cuda
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    began = time.perf_counter()
    module(x).backward(dy)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    x.grad = None
    return seconds, (torch.cuda.max_memory_allocated() - before) if on_gpu else 0


def saved_bytes(module: Callable[[Tensor], Tensor], x: Tensor) -> int:
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


def main() -> None:
    """Measure round robin, so that drift of the machine meets all alike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    modules = contenders(options.width, device, dtype)
    x = torch.randn(1, options.tokens, options.width, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)
    runs: dict[str, list[float]] = {name: [] for name in modules}
    peaks: dict[str, int] = {}
    for repeat in range(WARM_UP + REPEATS):
        for name, module in modules.items():
            seconds, peaks[name] = measure(module, x, dy)
            if repeat >= WARM_UP:
                runs[name].append(seconds)
    kept = {name: saved_bytes(module, x) for name, module in modules.items()}
    report(runs, peaks, kept, options)


def report(runs: dict[str, list[float]], peaks: dict[str, int], kept: dict[str, int], options: Any) -> None:
    """Print the table and the JSON line."""
    table = Table("", "median ms", "quartiles ms", "of base", "kept KiB", "peak MiB")
    medians = {name: statistics.median(times) for name, times in runs.items()}
    for name, times in runs.items():
        low, _, high = statistics.quantiles(times, n=4)
        ratio = f"{medians[name] / medians['base']:.3f}"
        spread = f"{1e3 * low:.1f} to {1e3 * high:.1f}"
        table.add_row(
            name, f"{1e3 * medians[name]:.1f}", spread, ratio, f"{kept[name] / 1024:.1f}", f"{peaks[name] / 2**20:.0f}"
        )
    Console().print(table)
    result = {
        "bench": "layer",
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "options": vars(options),
        "versions": {"torch": torch.__version__, "bitsandbytes": bnb.__version__, "peft": peft.__version__},
        "date": datetime.now(UTC).date().isoformat(),
        "median_s": medians,
        "saved_bytes": kept,
        "peak_bytes": peaks,
        "ours_per_lora": medians["ours"] / medians["peft lora"],
        "loop_per_ours": medians["expert loop"] / medians["ours"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
