"""What a run, an export or a base costs to ask: `bench`, after EfficientLLM's six measures, as defined here.

latency: of one request at a time, seconds to the first token and for each further one, p50 and p95 over requests.
serving: written tokens a second of `rows_at_once` requests together; ends of answers are not obeyed, so that all write
equally many. training: tokens a second that a run's own metrics tell, the median of its steps. memory: the most that
was used, of what there is. compute: processor time over wall time and cores; of a GPU not told. energy: joules a
written token (`energy`). compression: bytes of the parameters in 16 bits over the bytes they take here.
"""

import math
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from qd2mora.base.host_memory import most_resident_bytes
from qd2mora.base.passes import device_of
from qd2mora.evaluation.decoding import Decoding, Wanted
from qd2mora.evaluation.ends import Ends
from qd2mora.evaluation.energy import energy_meter
from qd2mora.evaluation.subject import Subject, open_subject
from qd2mora.memory import plan
from qd2mora.run_folder import RunFolder

_NEVER = Ends(())
PERCENTILES = (50, 95)


@dataclass(frozen=True)
class BenchOptions:
    """How much is asked: requests one at a time, then so many together; of `prompt` tokens, writing `tokens` each."""

    requests: int = 20
    rows_at_once: int = 8
    prompt: int = 64
    tokens: int = 32


@dataclass(frozen=True)
class Timed:
    """One request: seconds to its first token, and of each further one."""

    first_s: float
    later_s: list[float]


Numbers = dict[str, object]


def bench(model: str | Path, options: BenchOptions, *, with_plan: bool = False) -> Numbers:
    """Measure a run, an export or a base. Raises InputRefused, DamagedFile."""
    subject = open_subject(model)
    device = device_of(subject.plain)
    _request(subject, options, 1)  # what is compiled, allocated or read at first use is no part of a request
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    meter = energy_meter(device)
    before, began, used = meter.read(), time.perf_counter(), time.process_time()
    alone = [_request(subject, options, 1) for _ in range(options.requests)]
    together = _request(subject, options, options.rows_at_once)
    wall, work, after = time.perf_counter() - began, time.process_time() - used, meter.read()
    written = options.tokens * (options.requests + options.rows_at_once)
    found: Numbers = {
        "model": Path(model).name,
        "kind": _kind(subject),
        "device": device.type,
        "requests": options.requests,
        "prompt_tokens": options.prompt,
        "written_tokens": written,
        "latency": _latency(alone),
        "serving": {
            "rows_at_once": options.rows_at_once,
            "tokens_per_s": options.tokens * options.rows_at_once / (together.first_s + sum(together.later_s)),
        },
        "training": _training(subject),
        "memory": _memory(device),
        "compute": _compute(device, wall, work),
        "energy": {"source": meter.source, "joules_per_token": None},
        "compression": _compression(subject),
    }
    if before is not None and after is not None:
        found["energy"] = {"source": meter.source, "joules_per_token": after.since(before) / written}
    if with_plan:
        found["plan"] = _planned(subject)
    return found


def _request(subject: Subject, options: BenchOptions, rows: int) -> Timed:
    """Write `tokens` tokens after `rows` random prompts, and time each step."""
    most = min(1000, subject.plain.get_input_embeddings().num_embeddings)
    # From 3 on: past the tokens that LLaMA's kind of vocabulary has for unknown, begin and end.
    ids = torch.randint(3, most, (rows, options.prompt), generator=torch.Generator().manual_seed(0)).tolist()
    # Any vector costs what a row's own does.
    width = None if subject.run is None else subject.run.recipe.adapter.external_width
    vector = (0.0,) * width if width else None
    decoding = Decoding(subject, [Wanted(each, _NEVER, options.tokens, vector=vector) for each in ids])
    seconds = []
    with subject.writing():
        while not decoding.is_done:
            began = time.perf_counter()
            decoding.step()  # its tokens are on the host when it returns
            seconds.append(time.perf_counter() - began)
    return Timed(seconds[0], seconds[1:])


def _kind(subject: Subject) -> str:
    if subject.run is not None:
        return "run"
    return "adapter" if subject.is_adapted else "model"


def _latency(alone: list[Timed]) -> Numbers:
    later = [seconds for each in alone for seconds in each.later_s]
    firsts = [each.first_s for each in alone]
    return {"first_token_s": _percentiles(firsts), "later_token_s": _percentiles(later) if later else None}


def _percentiles(values: list[float]) -> dict[str, float]:
    """Return the smallest values that so many percent of all do not exceed."""
    ordered = sorted(values)
    return {f"p{share}": ordered[math.ceil(share / 100 * len(ordered)) - 1] for share in PERCENTILES}


def _training(subject: Subject) -> Numbers:
    """Return what a run's metrics say of its training."""
    if subject.run is None:
        return {"tokens_per_s": None, "why": "this is no run, nothing tells of its training"}
    steps = _steps(subject.run.folder)
    if not steps:
        return {"tokens_per_s": None, "why": "the run's metrics hold no step"}
    return {"tokens_per_s": statistics.median(steps), "steps": len(steps)}


def _steps(folder: RunFolder) -> list[float]:
    if not folder.metrics.is_file():
        return []
    return [float(line["tokens_per_s"]) for line in folder.metric_lines() if "tokens_per_s" in line]


def _memory(device: torch.device) -> Numbers:
    if device.type == "cuda":
        peak, whole = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    else:
        peak, whole = most_resident_bytes(), psutil.virtual_memory().total
    return {"peak_bytes": peak, "of_bytes": whole, "use": peak / whole}


def _compute(device: torch.device, wall_s: float, work_s: float) -> Numbers:
    if device.type != "cpu":
        return {"use": None, "why": "of a GPU it is not told here; its profiler knows"}
    # Of this process: a container may have fewer than the machine. Not every system tells.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"use": work_s / wall_s / cores, "cores": cores}


def _compression(subject: Subject) -> Numbers:
    """Return how much smaller the parameters are than in 16 bits; 4-bit weights hold two in each byte."""
    numbers = held = 0
    for parameter in subject.model.parameters():
        state = getattr(parameter, "quant_state", None)
        numbers += parameter.numel() if state is None else math.prod(state.shape)
        held += parameter.numel() * parameter.element_size()
        if state is not None:
            held += _scales(state)
    return {"parameters": numbers, "bytes": held, "rate": 2 * numbers / held}


def _scales(state: object) -> int:
    """Return the bytes of what lies beside 4-bit weights: scales, and the scales of those."""
    found = 0
    for each in (state, getattr(state, "state2", None)):
        absmax = getattr(each, "absmax", None)
        if absmax is not None:
            found += absmax.numel() * absmax.element_size()
    return found


def _planned(subject: Subject) -> Numbers:
    """Return the planned peak of a run's training beside the one its metrics tell."""
    if subject.run is None:
        return {"peak_bytes": None, "why": "a plan is of a run's training; this is none"}
    planned = plan(subject.run.recipe)
    lines = subject.run.folder.metric_lines() if subject.run.folder.metrics.is_file() else []
    measured = [int(line["memory"]) for line in lines if "memory" in line]
    if not measured:
        return {"peak_bytes": planned.peak_bytes, "error": None, "why": "the run's metrics tell no memory"}
    found: Numbers = {"peak_bytes": planned.peak_bytes, "measured_bytes": max(measured)}
    if planned.device.startswith("cpu"):
        return found | {
            "error": None,
            "why": "on a CPU what is measured is the whole program, the plan is of tensors",
        }
    return found | {"error": planned.peak_bytes / max(measured) - 1}


__all__ = ["BenchOptions", "bench"]
