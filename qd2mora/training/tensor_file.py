"""safetensors files, written in a stream: no second copy of the tensors in memory, and each byte hashed as it goes.

The library's writer copies every tensor, forces nothing to disk and makes files that only the owner can read (0.8); its
reader is used as it is.
"""

import json
from collections.abc import Iterator

import torch
from torch import Tensor

Inventory = dict[str, tuple[str, list[int]]]
"""Name to dtype and shape."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def inventory_of(tensors: dict[str, Tensor]) -> Inventory:
    """Return what a set of tensors is: name to dtype and shape."""
    return {name: (_DTYPES[tensor.dtype], list(tensor.shape)) for name, tensor in tensors.items()}


def encoded(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file holding CPU tensors; the same tensors give the same bytes."""
    # Wide items first: each tensor then starts at a multiple of its item size, as the reader of torch needs.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, start = {}, 0
    for name in order:
        stop = start + tensors[name].nbytes
        dtype, shape = _DTYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        if tensors[name].numel():
            yield tensors[name].detach().contiguous().view(-1).view(torch.uint8).numpy().data


__all__ = ["Inventory", "encoded", "inventory_of"]
