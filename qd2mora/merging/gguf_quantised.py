"""A GGUF file of four to eight bits, made of an f16 one by llama.cpp's own quantiser (llama-cpp-python, optional).

Which tensor takes which kind is llama.cpp's choice: in Q4_K_M some are Q6_K, and one whose rows do not divide into
blocks of 256 takes a kind that they do divide into. An importance matrix is not used: the binding (0.3.36) takes one
but does not make one.
"""

import ctypes
import os
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qd2mora.disk.file_hash import size_and_hash
from qd2mora.disk.gguf_header import gguf_package, read_header
from qd2mora.errors import DiskTrouble, InputRefused
from qd2mora.merging.rung import Written

QUANTISED = ("q4_k_m", "q5_k_m", "q6_k", "q4_0")
_ERROR = 3
"""How llama.cpp's log numbers an error, `ggml_log_level`."""


def llama_package() -> Any:
    """Return the `llama_cpp` module. Raises InputRefused where it is not installed."""
    try:
        import llama_cpp
    except ImportError:
        raise InputRefused(
            f"--dtype: {', '.join(QUANTISED)} are made by llama.cpp's quantiser, which is not installed: pip install "
            "'qd2mora[quantise]' (llama-cpp-python, built from source: it needs cmake and a C++ compiler); "
            "--dtype q8_0 goes without"
        ) from None
    return llama_cpp


def quantised(written: Written, folder: Path, dtype: str) -> Written:
    """Put `NAME-DTYPE.gguf` in the place of the f16 file that was written. Raises DiskTrouble."""
    (name,) = written.files
    source, target = folder / name, folder / f"{name.removesuffix('-f16.gguf')}-{dtype}.gguf"
    _quantise(source, target, dtype)
    source.unlink()
    kinds = Counter(_kind_name(place.kind) for place in read_header(target).tensors.values())
    return Written({target.name: size_and_hash(target)}, kinds=dict(kinds.most_common()))


def _quantise(source: Path, target: Path, dtype: str) -> None:
    llama, said = llama_package(), _heard()
    said.clear()
    settings = llama.llama_model_quantize_default_params()
    settings.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{dtype.upper()}")
    settings.nthread = torch.get_num_threads()
    code = llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(settings))
    if code:
        why = " ".join("".join(said).split()) or f"it ended with {code}"
        raise DiskTrouble(f"llama.cpp could not quantise {source.name} to {dtype}: {why[:300]}")


@cache
def _heard() -> list[str]:
    """Return where llama.cpp's errors are written down from now on; all else that it says goes nowhere."""
    llama, said = llama_package(), list[str]()

    def hear(level: int, text: bytes, _: object) -> None:
        if level == _ERROR:
            said.append(text.decode(errors="replace"))

    callback = llama.llama_log_callback(hear)
    llama.llama_log_set(callback, ctypes.c_void_p(0))
    _CALLBACKS.append(callback)
    return said


_CALLBACKS: list[Any] = []
"""What C calls must not be collected."""


def _kind_name(kind: int) -> str:
    name: str = gguf_package().GGMLQuantizationType(kind).name
    return name


__all__ = ["QUANTISED", "llama_package", "quantised"]
