"""Joules that were used, as the machine counts them: of a GPU by NVML, else of the processor by RAPL, else not at all.

Both are counters. NVML's is of one card, whoever used it; RAPL's is of whole processor packages, and begins anew at a
range of its own. Where neither can be read, energy is absent, and why is said.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")
_MILLI, _MICRO = 1e-3, 1e-6


@dataclass(frozen=True)
class Reading:
    """Counts of energy by counter, in joules, and the range at which each begins anew (None: never)."""

    joules: dict[str, float]
    ranges: dict[str, float | None]

    def since(self, before: "Reading") -> float:
        """Return the joules between two readings of the same counters; a counter may have begun anew once."""
        total = 0.0
        for name, now in self.joules.items():
            used = now - before.joules[name]
            span = self.ranges[name]
            total += used + span if used < 0 and span is not None else used
        return total


@dataclass(frozen=True)
class EnergyMeter:
    """Where energy can be read: `source` says where, or why nowhere."""

    source: str
    device: torch.device
    rapl: Path = RAPL

    @property
    def is_there(self) -> bool:
        """Whether there is anything to read."""
        return self.source in ("NVML", "RAPL")

    def read(self) -> Reading | None:
        """Return what the counters say now; None where there are none."""
        if self.source == "NVML":
            return Reading({"card": _card_joules(self.device) or 0.0}, {"card": None})
        if self.source == "RAPL":
            return _package_joules(self.rapl)
        return None


def energy_meter(device: torch.device, rapl: Path = RAPL) -> EnergyMeter:
    """Return a meter of what a model on this device uses."""
    if device.type == "cuda":
        source = "NVML" if _card_joules(device) is not None else "absent: NVML counts no energy of this card"
        return EnergyMeter(source, device)
    if _package_joules(rapl) is not None:
        return EnergyMeter("RAPL", device, rapl)
    return EnergyMeter(f"absent: no counter of RAPL can be read in {rapl}", device, rapl)


def _package_joules(rapl: Path) -> Reading | None:
    """Return the counters of processor packages; None where none can be read (often root alone may)."""
    joules, ranges = {}, dict[str, float | None]()
    for folder in sorted(rapl.glob("intel-rapl:*")):
        if folder.name.count(":") > 1:  # a part of a package, which the package counts already
            continue
        try:
            joules[folder.name] = int((folder / "energy_uj").read_text(encoding="ascii")) * _MICRO
            ranges[folder.name] = int((folder / "max_energy_range_uj").read_text(encoding="ascii")) * _MICRO
        except (OSError, ValueError):
            return None
    return Reading(joules, ranges) if joules else None


def _card_joules(device: torch.device) -> float | None:
    """Return the joules that a card has used since its driver was loaded, by NVML; None where it does not tell."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle, used = ctypes.c_void_p(), ctypes.c_ulonglong()
    # By its UUID: the numbers of NVML know nothing of CUDA_VISIBLE_DEVICES.
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    calls = (
        lambda: library.nvmlInit_v2(),
        lambda: library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)),
        lambda: library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(used)),
    )
    if any(call() != 0 for call in calls):
        return None
    return used.value * _MILLI


__all__ = ["EnergyMeter", "Reading", "energy_meter"]
