"""Where a model runs, and in which dtype."""

import os
from pathlib import Path

import torch

from qd2mora.errors import InputRefused
from qd2mora.recipe import Base

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What a recipe and an export call them."""


def has_flash_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether attention without a mask runs in PyTorch's flash kernel: 16-bit products on a card since Ampere.

    Elsewhere a mask is no loss: without one, grouped heads would take the kernel that writes all scores out (torch
    2.13; the memory-efficient one knows no groups).
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


DEVICES = Path("/dev")
"""Where Linux shows the driver's devices: nvidia0 and so on."""


def default_device() -> torch.device:
    """Return this process's CUDA device where there is one, else the CPU.

    Raises InputRefused where there is a card that PyTorch cannot use: a 7B on the CPU of such a machine would run for
    weeks, and nothing would say why.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    refuse_unused_card(DEVICES)
    return torch.device("cpu")


def refuse_unused_card(devices: Path) -> None:
    """Refuse a machine whose `devices` show a card while torch has none, unless none is to be seen.

    CUDA_VISIBLE_DEVICES set to nothing says that. Raises InputRefused.
    """
    cards = sorted(path.name for path in devices.glob("nvidia[0-9]*"))
    if not cards or os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return
    if torch.version.cuda is None:
        why = f"PyTorch {torch.__version__} is a build for CPUs; install a build for CUDA"
    else:
        why = f"CUDA {torch.version.cuda} of PyTorch does not start ({_why_no_cuda()}); update the card's driver"
    raise InputRefused(
        f"a GPU is here ({cards[0]}) and would not be used: {why}, or train on the CPU with CUDA_VISIBLE_DEVICES="
    )


def _why_no_cuda() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0]
    return "no card answers"


def compute_dtype(base: Base, device: torch.device) -> torch.dtype:
    """Return the dtype that products run in: bfloat16 or float16 on a GPU, float32 on a CPU (16-bit is slow there)."""
    if base.compute_dtype != "auto":
        return FLOATS[base.compute_dtype]
    if device.type != "cuda":
        return torch.float32
    # Not emulated: cards before Ampere answer yes otherwise, and make bfloat16 of float32 in software.
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


__all__ = ["FLOATS", "compute_dtype", "default_device", "has_flash_attention", "refuse_unused_card"]
