"""Safetensors files written as a stream: a tensor comes in blocks of rows and is never whole in memory here.

The header needs names, kinds and shapes alone, so it goes first; each file is forced to disk and hashed on the way.
Tensors of wide numbers stand before those of narrow ones in a file, so that each begins at a multiple of its own size.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qd2mora.disk.durable import write_file
from qd2mora.errors import InputRefused

INDEX = "model.safetensors.index.json"
KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class Entry:
    """One tensor to be written: `blocks` yields its rows in order, in the dtype and on the CPU."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Tensor]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class File:
    """What stands on disk: a file's size in bytes and the SHA-256 of what was meant to be written."""

    name: str
    num_bytes: int
    sha256: str


def entry(name: str, tensor: Tensor) -> Entry:
    """Return the entry of a small tensor that is at hand."""
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: iter([tensor.detach().cpu()]))


def shard_bytes(text: str) -> int:
    """Read a size such as 5GB or 500MiB. Raises InputRefused."""
    number = text.strip().rstrip("BKMGibkmg")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = int(float(number) * _UNITS[unit or "B"])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise InputRefused(f"--max-shard: '{text}' will not do: a size such as 5GB or 500MiB")
    return size


def write_shards(folder: Path, entries: list[Entry], limit: int) -> list[File]:
    """Write `model.safetensors`, or several files of at most `limit` bytes (or one tensor) with their index."""
    groups: list[list[Entry]] = [[]]
    size = 0
    for each in entries:
        if groups[-1] and size + each.num_bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(each)
        size += each.num_bytes
    if len(groups) == 1:
        return [write_tensors(folder / "model.safetensors", groups[0])]
    files, places = [], {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        files.append(write_tensors(folder / name, group))
        places.update({each.name: name for each in group})
    total = sum(each.num_bytes for each in entries)
    content = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1) + "\n"
    return [*files, File(INDEX, *write_file(folder / INDEX, [content.encode()]))]


def write_tensors(path: Path, entries: list[Entry]) -> File:
    """Write one file. A block that does not fit its tensor is a defect of the caller."""
    ordered = sorted(entries, key=lambda each: -each.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for each in ordered:
        span = [place, place + each.num_bytes]
        header[each.name] = {"dtype": KINDS[each.dtype], "shape": list(each.shape), "data_offsets": span}
        place = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return File(path.name, *write_file(path, _chunks(text, ordered)))


def _chunks(header: bytes, entries: list[Entry]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little") + header
    for each in entries:
        written = 0
        for block in each.blocks():
            assert block.dtype == each.dtype
            written += block.nbytes
            if block.numel():
                yield block.contiguous().reshape(-1).view(torch.uint8).numpy().data
        assert written == each.num_bytes, each.name


__all__ = ["INDEX", "Entry", "File", "entry", "shard_bytes", "write_shards", "write_tensors"]
