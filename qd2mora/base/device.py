"""Where a model runs, and in which dtype."""

import os

import torch

from qd2mora.recipe import Base

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What a recipe and an export call them."""


def default_device() -> torch.device:
    """Return this process's CUDA device where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def compute_dtype(base: Base, device: torch.device) -> torch.dtype:
    """Return the dtype that products run in: bfloat16 or float16 on a GPU, float32 on a CPU (16-bit is slow there)."""
    if base.compute_dtype != "auto":
        return FLOATS[base.compute_dtype]
    if device.type != "cuda":
        return torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


__all__ = ["FLOATS", "compute_dtype", "default_device"]
