"""What of the machine decides the last bits of a run on a CPU: how many threads share a sum, and which instructions.

A resume takes the number of threads that its run began with. Instructions are chosen as a process starts, by the
processor and by settings of the environment: others are a changed world, refused by name. Another model of a processor
or GPU may round otherwise too, and is told.
"""

import os
import platform
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.utils.deterministic

_SETTINGS = (
    *("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"),
    *("ONEDNN_CPU_ISA_HINTS", "DNNL_CPU_ISA_HINTS", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
    "OPENBLAS_CORETYPE",
)
"""By which libraries are told to use other instructions than the processor has; torch's own shows in its capability."""
MOST_THREADS = 1024


def machine_identity(device: torch.device) -> dict[str, object]:
    """Return what another machine could have otherwise, a part of a run's identity; nothing on a GPU."""
    if device.type != "cpu":
        return {}
    return {"threads": torch.get_num_threads(), "instructions": _instructions()}


def completed(identity: Mapping[str, object], threads: object) -> dict[str, object]:
    """Return a run's identity with what runs of before said of their machine elsewhere, or did not say."""
    if identity.get("device") != "cpu" or threads is None:
        return dict(identity)
    return {"threads": threads, "instructions": _instructions(), **identity}


def take_machine(before: Mapping[str, object] | None, device: torch.device, allowed: Collection[str]) -> list[str]:
    """Compute with the threads that a run began with; return what there is to say of that and of the processor.

    `before`: the manifest of the run that is resumed. `allowed`: what may have changed since, `threads` among it.
    """
    if before is None:
        return []
    said, threads, there = [], before.get("threads"), torch.get_num_threads()
    is_ours = device.type == "cpu" and "threads" not in allowed
    if is_ours and isinstance(threads, int) and 0 < threads <= MOST_THREADS and threads != there:
        torch.set_num_threads(threads)
        counted = "1 thread" if threads == 1 else f"{threads} threads"
        said.append(
            f"computing with {counted}, as the run began, where {there} are set: others add up in another "
            "order; --allow-changed threads takes those"
        )
    began, here = before.get("device"), device_name(device)
    if began not in (here, device.type):  # runs of before said no more of a CPU
        said.append(f"the run began on {began}, this is {here}: the last bits may be other than an unbroken run's")
    return said


@contextmanager
def repeatable(device: torch.device, is_wanted: bool) -> Iterator[None]:
    """Have a GPU add up in one order while the block runs, where that is wanted, and a CPU keep its threads after it.

    Then an attention's backward pass, `index_add` and cuBLAS give the same bits in every run, at a price that is small
    where attention has no mask. An operation that knows no such order is told of, not refused: the run goes on.
    Sums of float16 products stay in float32 in any case, which a T4 would keep in 16 bits.
    """
    threads = torch.get_num_threads()
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    settings: Any = torch.utils.deterministic
    fills, reduces = settings.fill_uninitialized_memory, torch.backends.cuda.matmul
    was_reduced = reduces.allow_fp16_reduced_precision_reduction
    if device.type == "cuda":
        reduces.allow_fp16_reduced_precision_reduction = False
    if device.type == "cuda" and is_wanted:
        # Read where cuBLAS is first used, and without it one of its own orders is another in every process.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Or every empty tensor would be written once more, to show reads of what nobody wrote.
        settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fills
        reduces.allow_fp16_reduced_precision_reduction = was_reduced
        torch.set_num_threads(threads)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"cpu, {name}"


def _instructions() -> str:
    settings = [f"{name}={os.environ[name]}" for name in _SETTINGS if name in os.environ]
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *settings])


__all__ = ["completed", "device_name", "machine_identity", "repeatable", "take_machine"]
