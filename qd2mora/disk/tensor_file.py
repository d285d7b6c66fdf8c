"""safetensors files: one table of dtypes, one check of headers, one reader that reads on demand, one streaming writer.

The library's writer (0.8) copies every tensor, forces nothing to disk and makes files that only the owner can read. Its
reader maps files, and what was read of a map counts as this process's memory until the file is closed: of a model in
shards, all of it. Here a tensor is written in blocks of rows and read by rows, each into memory of its own.

A file is eight bytes with the header's length, the header in JSON (name to dtype, shape and place), and the data.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType

import torch
from torch import Tensor

from qd2mora.disk.durable import write_file
from qd2mora.disk.file_content import json_object, refuse_by_magic
from qd2mora.disk.file_hash import SizeAndHash
from qd2mora.errors import DamagedFile, InputRefused

MAX_HEADER = 2 << 20

Inventory = dict[str, tuple[str, list[int]]]
"""Name to dtype and shape."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's dtypes, all of which are checked, read and written; a file with another is damaged."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, read when it is asked for, into memory of its own.

    Has what transformers asks of the library's slices: `get_shape`, `get_dtype` and an index.
    """

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Where its bytes begin in the file."""

    def get_shape(self) -> list[int]:
        """Return its shape."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """Return its dtype as the format names it."""
        return _NAMES[self.dtype]

    def __getitem__(self, index: EllipsisType | slice | tuple[slice, ...]) -> Tensor:
        return self.read()[index]

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        """Return rows `first` to `last` (all of it where it has no axis), fresh.

        Raises OSError, and InputRefused where a number of them is not finite.
        """
        if not self.shape:
            rows = torch.empty((), dtype=self.dtype)
        else:
            last = self.shape[0] if last is None else last
            rows = torch.empty((last - first, *self.shape[1:]), dtype=self.dtype)
        if rows.numel():
            row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
            _read_into(rows.view(-1).view(torch.uint8).numpy().data, self.path, self.start + first * row_bytes)
        if not is_finite(rows):
            raise InputRefused(f"{self.path}: tensor '{self.name[:200]}' holds a number that is not finite")
        return rows


def _read_into(memory: memoryview, path: Path, start: int) -> None:
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while memory:  # a read may be short
            num_read = file.readinto(memory)
            if not num_read:
                raise OSError(f"{path} is cut short")
            memory = memory[num_read:]


def is_finite(tensor: Tensor) -> bool:
    """Tell whether every number of a tensor is finite; integers are."""
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    # torch finds no least and greatest of 8-bit floats.
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    # A NaN is least and most of all; `isfinite` takes forty times as long and a tensor of its own.
    return all(math.isfinite(float(end)) for end in tensor.aminmax())


def check_finite(path: Path) -> None:
    """Read every tensor of a file. Raises InputRefused where one holds a number that is not finite, DamagedFile."""
    for tensor in _tensors_of(path).values():
        tensor.read()


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return the tensors of safetensors files by name, each header checked against its file, without reading any.

    Raises InputRefused where a file is something else by its content, DamagedFile where it is not whole.
    """
    return {name: tensor for path in files for name, tensor in _tensors_of(path).items()}


def check_safetensors(path: Path) -> None:
    """Check a file's header against its size, without reading its data. Raises as `stored_tensors` does."""
    _tensors_of(path)


def _tensors_of(path: Path) -> dict[str, StoredTensor]:
    length, header = _header_of(path)
    data = 8 + length
    found, spans = {}, []
    for name, entry in header.items():
        if name != "__metadata__":
            dtype, shape, begin, end = _checked_entry(name, entry, path)
            found[name] = StoredTensor(path, name, dtype, shape, data + begin)
            spans.append((begin, end))
    # Side by side without overlap or gap, up to the end of the file: no byte is read twice, and none hides between.
    place = 0
    for begin, end in sorted(spans):
        if begin != place:
            raise DamagedFile(f"{path}: tensors overlap or leave a gap at byte {min(begin, place)} of the data")
        place = end
    size = path.stat().st_size
    if place != size - data:
        raise DamagedFile(f"{path}: {place} bytes of tensors in {size - data} bytes of data")
    return found


def _header_of(path: Path) -> tuple[int, Mapping[str, object]]:
    """Return a header's length and what it says, read only where its length is one that a header may have."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        if len(start) < 9 or start[8:] != b"{" or length > MAX_HEADER:
            refuse_by_magic(path, start)
            raise DamagedFile(f"{path} is no safetensors file: its header says {length} bytes (limit {MAX_HEADER})")
        if 8 + length > size:
            raise DamagedFile(f"{path} is cut short: a header of {length} bytes in a file of {size}")
        file.seek(8)
        return length, json_object(file.read(length), path)


def _checked_entry(name: str, entry: object, path: Path) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """Return what a header says of one tensor: dtype, shape, and the first and last place of its bytes."""
    fields = entry if isinstance(entry, dict) else {}
    shape, offsets, dtype = _counts(fields.get("shape")), _counts(fields.get("data_offsets")), fields.get("dtype")
    if shape is None or len(shape) > 16 or offsets is None or len(offsets) != 2:
        raise DamagedFile(f"{path}: tensor {name[:80]!r} has no whole shape and place")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise DamagedFile(f"{path}: tensor {name[:80]!r} is of an unknown kind")
    if math.prod(shape) * DTYPES[dtype].itemsize != offsets[1] - offsets[0]:
        raise DamagedFile(f"{path}: tensor {name[:80]!r} does not fill its place")
    return DTYPES[dtype], shape, offsets[0], offsets[1]


def _counts(value: object) -> tuple[int, ...] | None:
    """Return a JSON list of numbers that count something in a file; None where it is none."""
    if not isinstance(value, list) or not all(type(number) is int and 0 <= number < 1 << 63 for number in value):
        return None
    return tuple(value)


@dataclass(frozen=True)
class TensorToWrite:
    """One tensor to be written: `blocks` yields its rows in order, in the dtype and on the CPU."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Tensor]]

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def tensor_at_hand(name: str, tensor: Tensor) -> TensorToWrite:
    """Return a tensor in memory as one to write; it is copied to the CPU when its turn comes."""
    return TensorToWrite(name, tensor.dtype, tuple(tensor.shape), lambda: iter([tensor.detach().cpu()]))


def write_tensors(path: Path, tensors: Sequence[TensorToWrite]) -> SizeAndHash:
    """Write a file that transformers and PEFT read. A block that does not fit its tensor is a defect of the caller."""
    # transformers 5 and PEFT 0.21 refuse files that do not name the framework.
    return write_file(path, _file_in_pieces(tensors, {"__metadata__": {"format": "pt"}}))


def encoded(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a file of CPU tensors; the same tensors, in any order, give the same bytes."""
    return _file_in_pieces([tensor_at_hand(name, tensors[name]) for name in sorted(tensors)], {})


def _file_in_pieces(tensors: Sequence[TensorToWrite], header: Mapping[str, object]) -> Iterator[bytes | memoryview]:
    # Wide items first: each tensor then starts at a multiple of its item size, as the reader of torch needs.
    ordered = sorted(tensors, key=lambda each: -each.dtype.itemsize)
    entries, place = dict(header), 0
    for each in ordered:
        span = [place, place + each.num_bytes]
        entries[each.name] = {"dtype": _NAMES[each.dtype], "shape": list(each.shape), "data_offsets": span}
        place = span[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Padded, as the library does it, so that the data begins at a multiple of eight.
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for each in ordered:
        yield from _data_in_pieces(each)


def _data_in_pieces(tensor: TensorToWrite) -> Iterator[memoryview]:
    written = 0
    for block in tensor.blocks():
        assert block.dtype == tensor.dtype
        written += block.nbytes
        if block.numel():
            yield block.contiguous().reshape(-1).view(torch.uint8).numpy().data
    assert written == tensor.num_bytes, tensor.name


def inventory_of(tensors: Mapping[str, Tensor]) -> Inventory:
    """Return what a set of tensors is: name to dtype and shape."""
    return {name: (_NAMES[tensor.dtype], list(tensor.shape)) for name, tensor in tensors.items()}


__all__ = [
    "DTYPES",
    "MAX_HEADER",
    "Inventory",
    "StoredTensor",
    "TensorToWrite",
    "check_finite",
    "check_safetensors",
    "encoded",
    "inventory_of",
    "is_finite",
    "stored_tensors",
    "tensor_at_hand",
    "write_tensors",
]
