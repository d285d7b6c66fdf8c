"""What a run will use of this machine, and what it will not: each fact is found out by doing the thing, in small."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from qd2mora.base import compute_dtype, default_device, is_nf4, load_base
from qd2mora.base.device import has_flash_attention
from qd2mora.base.host_memory import available_bytes, lockable_bytes
from qd2mora.errors import InputRefused
from qd2mora.memory.place import room_on_card
from qd2mora.mixture.kernels import working_kernel
from qd2mora.recipe import Base

GIB = 1 << 30
PROBE_BYTES = 64 << 20
"""Written and read to learn the disk's speed: beyond most drives' own caches, and over in a second."""
SLOW_DISK = 100
"""MiB a second below which checkpoints of a large adapter are waited for."""
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "deepspeed", "triton", "llama_cpp_python")


@dataclass(frozen=True)
class Fact:
    """One line: what was looked at, what is there, and what that means for a run where it means something."""

    topic: str
    found: str
    meaning: str = ""
    is_problem: bool = False


def check_machine(folder: Path) -> list[Fact]:
    """Look at the machine; `folder` is on the disk that runs go to, where a probe is written and removed."""
    checks: tuple[Callable[[], Iterator[Fact]], ...] = (_device, _arithmetic, _kernels, _memory, _packages)
    facts = [fact for check in checks for fact in check()]
    return [*facts, *_disk(folder)]


def as_json(facts: list[Fact]) -> list[dict[str, object]]:
    """Return the facts as `doctor --json` prints them."""
    return [asdict(fact) for fact in facts]


def _device() -> Iterator[Fact]:
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    try:
        device = default_device()
    except InputRefused as error:
        yield Fact("graphics card", "there, and not used", str(error), is_problem=True)
        return
    if device.type == "cpu":
        yield Fact("graphics card", "none", "runs train on the processor, in float32")
        yield Fact("processor", cores)
        return
    card = torch.cuda.get_device_properties(device)
    capability = f"compute {card.major}.{card.minor}, CUDA {torch.version.cuda}, driver {_driver()}"
    yield Fact("graphics card", f"{card.name}, {card.total_memory / GIB:.1f} GiB", capability)
    yield Fact("its memory", f"{room_on_card(device) / GIB:.1f} GiB free", "what plans go by without a memory.budget")
    yield Fact("processor", cores)


def _driver() -> str:
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
    except OSError:
        return "of unknown version"
    return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), "of unknown version")


def _arithmetic() -> Iterator[Fact]:
    try:
        device = default_device()
    except InputRefused:
        return
    dtype = compute_dtype(Base(model="random:tiny"), device)
    yield Fact("products", str(dtype).removeprefix("torch."), "what base.compute_dtype: auto takes here")
    if device.type == "cuda":
        attention = "flash" if has_flash_attention(device, dtype) else "memory-efficient, with a mask"
        yield Fact("attention", attention)
    base = load_base(Base(model="random:tiny"), device)
    works = is_nf4(base.get_submodule("model.layers.0.mlp.up_proj"))
    yield Fact(
        "4-bit weights", "bitsandbytes works" if works else "bitsandbytes does not quantise", is_problem=not works
    )


def _kernels() -> Iterator[Fact]:
    if not torch.cuda.is_available():
        return
    compiler = shutil.which(os.environ.get("CC", "")) or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    there = f"C compiler {compiler or 'missing'}, Python.h {'there' if header.is_file() else 'missing'}"
    if working_kernel(default_device()) is not None:
        yield Fact("kernels", "compiled and launched", there)
    else:
        yield Fact("kernels", "not used: the mixture runs by PyTorch alone, slower", there, is_problem=True)


def _memory() -> Iterator[Fact]:
    yield Fact("host memory", f"{available_bytes() / GIB:.1f} GiB free")
    limit = lockable_bytes()
    if limit is None:
        yield Fact("pinned memory", "no limit")
    else:
        # CUDA pins through the driver, which most systems do not hold to it; containers' own limits are others.
        yield Fact("pinned memory", f"ulimit -l {limit >> 10} KiB", "CUDA may pin more; if not, copies are waited for")


def _packages() -> Iterator[Fact]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    yield Fact("packages", ", ".join([f"Python {sys.version.split()[0]}", *found]))


def _disk(folder: Path) -> Iterator[Fact]:
    try:
        speed = _written_a_second(folder)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield Fact("disk", f"'{folder}' cannot be written: {error.strerror}", "output: another folder", is_problem=True)
        return
    words = f"{free / GIB:.1f} GiB free, {speed:,.0f} MiB a second written and synced"
    yield Fact("disk", words, "checkpoints will be waited for" if speed < SLOW_DISK else "")


def _written_a_second(folder: Path) -> float:
    """Return MiB a second, the sync included."""
    part = os.urandom(1 << 20)  # random: some disks compress
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as probe:
        began = time.perf_counter()
        for _ in range(PROBE_BYTES >> 20):
            probe.write(part)
        probe.flush()
        os.fsync(probe.fileno())
        return (PROBE_BYTES >> 20) / (time.perf_counter() - began)


__all__ = ["Fact", "as_json", "check_machine"]
