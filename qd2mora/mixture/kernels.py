"""Where Triton's kernels run, found out by a launch; without them the same numbers come from PyTorch alone."""

import functools
import importlib
import importlib.util
import logging
import subprocess
from types import ModuleType

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

OPTIONS = {"enable_fp_fusion": True}
"""Said, because Triton 3.10 changes what it takes where nothing is said: sums would round otherwise after an update."""


def runs_kernels(tensor: Tensor) -> bool:
    """Tell whether a tensor lies where kernels run: really on a GPU, not a stand-in for shapes alone."""
    # FakeTensor and DTensor are Tensors on "cuda" as well; a kernel would take their storage for real.
    return tensor.is_cuda and type(tensor) in (Tensor, torch.nn.Parameter)


def kernels_for(tensor: Tensor, name: str) -> ModuleType | None:
    """Return the module of kernels `qd2mora.NAME` where it runs on a tensor; None where its twin has to."""
    if not runs_kernels(tensor):
        return None
    return working_kernel(tensor.device, name)


@functools.cache
def working_kernel(device: torch.device, name: str = "mixture.rank_kernel") -> ModuleType | None:
    """Return a module of kernels where a small launch ends well; why it did not is logged, once.

    Triton comes with torch where there is a GPU, and is not needed elsewhere. It builds its launcher with the machine's
    C compiler and Python's headers, which many machines do not have, and finds that out at the first launch.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        # Imported by name and late: the module needs Triton as soon as it is read.
        kernel = importlib.import_module(f"qd2mora.{name}")
        kernel.try_out(device)
    except (ImportError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        _log.warning("kernels: Triton does not run here (%s); the same step by PyTorch alone, which is slower", why[-1])
        return None
    return kernel


__all__ = ["OPTIONS", "kernels_for", "runs_kernels", "working_kernel"]
