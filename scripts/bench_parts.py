"""What the benches share: the authors' loop, a clock that goes round robin, peak bytes, and the report.

The loop is written anew from the formula of the D2MoRA release (iLearn-Lab/AAAI26-D2MoRA): x goes to float32 for each
down expert, and each up expert's full-width output is formed, weighed, scaled and added, one after the other.
"""

import json
import platform
import shlex
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qd2mora.mixture import MixtureLinear

REPEATS, WARM_UP = 20, 3


class ExpertLoop(nn.Module):
    """A D2MoRA layer's tensors and base, run as a loop over experts; each down expert drops x anew."""

    def __init__(self, layer: MixtureLinear, dropout: float = 0.0) -> None:
        super().__init__()
        self.base, self.scaling, self.dropout = layer.base_layer, layer.scaling("default"), dropout
        tensors = layer.tensors("default")
        self.downs = nn.ParameterList([nn.Parameter(part.detach().clone()) for part in tensors["mixture_A"]])
        self.ups = nn.ParameterList([nn.Parameter(part.detach().clone()) for part in tensors["mixture_B"]])
        self.router_down = nn.Parameter(tensors["mixture_router_down"].detach().clone())
        self.router_up = nn.Parameter(tensors["mixture_router_up"].detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return base(x) plus the mixture, (..., O)."""
        result = self.base(x)
        gate_down = F.linear(x.float(), self.router_down.float()).softmax(-1)
        z = torch.zeros((), device=x.device)
        for i, down in enumerate(self.downs):
            dropped = F.dropout(x.float(), self.dropout) if self.dropout else x.float()
            z = z + F.linear(dropped, down.float()) * gate_down[..., i : i + 1]
        gate_up = F.linear(z, self.router_up.float()).softmax(-1)
        for j, up in enumerate(self.ups):
            result = result + F.linear(z, up.float()) * gate_up[..., j : j + 1] * self.scaling
        return result.to(x.dtype)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made while it is on, each storage once: those alive, and the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in inputs:
                self._add(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes alive at once beyond those before: of tensors, or on a GPU as its allocator counts."""
    if device.type != "cuda":
        with LiveBytes() as live:
            run()
        return live.peak
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def round_robin(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: int = WARM_UP,
) -> dict[str, list[float]]:
    """Return seconds of each run, one after the other in turn, so that drift of the machine meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(warm_up + repeats):
        for name, run in runs.items():
            _wait(device)
            began = clock()
            run()
            _wait(device)
            if repeat >= warm_up:
                times[name].append(clock() - began)
    return times


def worked(runs: Mapping[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each run on one thread: on a shared machine they tell work from waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = round_robin(runs, device, repeats, time.process_time, warm_up=1)
    torch.set_num_threads(threads)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(times: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return median and quartiles in seconds of each run."""
    found = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        found[name] = {"median_s": median, "q1_s": low, "q3_s": high}
    return found


def ratio(times: Mapping[str, list[float]], over: str, under: str) -> dict[str, float]:
    """Return the ratio of two medians, and median and quartiles of the ratio of neighbouring runs."""
    low, median, high = statistics.quantiles(
        [a / b for a, b in zip(times[over], times[under], strict=True)], n=4, method="inclusive"
    )
    of_medians = statistics.median(times[over]) / statistics.median(times[under])
    return {"of_medians": of_medians, "median": median, "q1": low, "q3": high}


def context(device: torch.device, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a result must name: device, versions, date, command."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "bitsandbytes": bnb.__version__, "peft": peft.__version__},
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", *map(_placeless, sys.argv)]),
        "options": {key: _placeless(value) for key, value in options.items()},
    }


def _placeless(value: Any) -> Any:
    """Return the name of what lies at a place of this machine; all else as it is."""
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value


def _processor() -> str:
    """Return the CPU's name and what torch makes of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"cpu: {names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def report(result: dict[str, Any], columns: Mapping[str, Mapping[str, str]], out: str | None) -> None:
    """Print a table of runs, then one line of JSON; write it to a file where one is named."""
    names = next(iter(columns.values()))
    table = Table("", *columns)
    for name in names:
        table.add_row(name, *(column.get(name, "") for column in columns.values()))
    Console(width=140).print(table)
    for name, found in result["ratios"].items():
        print(f"{name}: {found['median']:.3f} ({found['q1']:.3f} to {found['q3']:.3f})")
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def time_columns(found: Mapping[str, Mapping[str, float]], base: str) -> dict[str, dict[str, str]]:
    """Return the table's columns of times."""
    milli = {name: {key: 1e3 * value for key, value in each.items()} for name, each in found.items()}
    return {
        "median ms": {name: f"{each['median_s']:.1f}" for name, each in milli.items()},
        "quartiles ms": {name: f"{each['q1_s']:.1f} to {each['q3_s']:.1f}" for name, each in milli.items()},
        "of base": {name: f"{each['median_s'] / milli[base]['median_s']:.3f}" for name, each in milli.items()},
    }


def size(num_bytes: int, unit: str) -> str:
    """Return bytes in KiB or MiB."""
    return f"{num_bytes / {'KiB': 2**10, 'MiB': 2**20}[unit]:.1f}"


__all__ = [
    "REPEATS",
    "WARM_UP",
    "ExpertLoop",
    "LiveBytes",
    "context",
    "peak_bytes",
    "ratio",
    "report",
    "round_robin",
    "size",
    "summary",
    "time_columns",
    "worked",
]
