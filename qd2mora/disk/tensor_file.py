"""safetensors files: written in a stream, without a second copy of the tensors, and read tensor by tensor.

The library's writer (0.8) copies every tensor, forces nothing to disk and makes files that only the owner can read. Its
reader maps files, and what was read of a map counts as this process's memory until the file is closed: of a model in
shards, all of it. Where that matters, `tensors_on_disk` reads instead.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_TORCH = {name: dtype for dtype, name in _DTYPES.items()}


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


@dataclass(frozen=True)
class OnDisk:
    """A tensor that is read when it is indexed, into memory of its own; has the methods of the library's slices."""

    path: Path
    dtype: str
    shape: list[int]
    start: int
    """Where its bytes begin in the file."""

    def get_shape(self) -> list[int]:
        """Return its shape."""
        return self.shape

    def get_dtype(self) -> str:
        """Return its dtype as the format names it."""
        return self.dtype

    def __getitem__(self, index: Any) -> Tensor:
        whole = torch.empty(self.shape, dtype=_TORCH[self.dtype])
        if whole.numel():
            left: memoryview = whole.view(-1).view(torch.uint8).numpy().data
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.start)
                while left:
                    num_read = file.readinto(left)
                    if not num_read:
                        raise OSError(f"{self.path} is cut short")
                    left = left[num_read:]
        return whole if index is Ellipsis else whole[index]


def tensors_on_disk(files: Iterable[Path]) -> dict[str, OnDisk]:
    """Return the tensors of safetensors files that were checked, by name, without reading any."""
    found = {}
    for path in files:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin = 8 + length + entry["data_offsets"][0]
            found[name] = OnDisk(path, entry["dtype"], entry["shape"], begin)
    return found


__all__ = ["Inventory", "OnDisk", "encoded", "inventory_of", "tensors_on_disk"]
