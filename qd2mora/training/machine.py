"""What of the machine decides the last bits of a run on a CPU: how many threads share a sum, and which instructions.

A resume takes the number of threads that its run began with. Instructions are chosen as a process starts, by the
processor and by settings of the environment: others are a changed world, refused by name. Another model of a processor
or GPU may round otherwise too, and is told.
"""

import os
import platform
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

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


__all__ = ["completed", "device_name", "machine_identity", "take_machine"]
