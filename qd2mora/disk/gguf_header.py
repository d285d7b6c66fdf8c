"""The header of a GGUF file: read once, every count, size and offset checked against the file before anything is made.

The `gguf` package's own reader (0.19) maps the whole file, whose pages then count as this process's memory, and takes
a header at its word: a count of 2^60 keys is a loop of 2^60. Here what a header says is bounded first; numbers of
tensors are read in plain reads, a block of rows at a time, and dequantised by that package.

A file is magic, version, the number of tensors and of keys; keys with typed values; a table of tensors (name, sizes,
the fastest first, kind, place); and, aligned, the data. llama.cpp `ggml/include/gguf.h`, versions 2 and 3.
"""

import logging
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qd2mora.errors import DamagedFile, InputRefused

MAX_HEADER = 256 << 20
MAX_KEYS = 4096
MAX_TENSORS = 65_536
MAX_TEXT = 16 << 20
MAX_ENTRIES = 4_000_000
"""Of an array: a vocabulary has 262,144 tokens at most, and twice as many merges."""
MAX_NUMBERS = 1 << 40
_MAGIC = b"GGUF"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY, _BOOL = 8, 9, 7
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def gguf_package() -> Any:
    """Return the `gguf` module. Raises InputRefused where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise InputRefused("GGUF files need the gguf package: pip install 'qd2mora[gguf]'") from None
    # It tells every tensor it writes.
    logging.getLogger("gguf").setLevel(logging.ERROR)
    return gguf


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies: its shape in torch's order, its kind as ggml numbers it, and its bytes in the file."""

    path: Path
    shape: tuple[int, ...]
    kind: int
    start: int
    num_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What a file, or all parts of one, says: values by key, and places of tensors by name."""

    content: dict[str, Any]
    tensors: dict[str, TensorPlace]


def read_header(path: Path) -> GgufHeader:
    """Read and check a header; of a file in parts, those of all. Raises InputRefused, DamagedFile."""
    parts = parts_of(path)
    headers = [_read_one(part) for part in parts]
    tensors: dict[str, TensorPlace] = {}
    for part, header in zip(parts, headers, strict=True):
        twice = tensors.keys() & header.tensors.keys()
        if twice:
            raise DamagedFile(f"{part}: tensor {min(twice)} stands in another part too")
        tensors |= header.tensors
    said = headers[0].content.get("split.count", len(parts))
    if said not in (0, len(parts)):
        raise InputRefused(f"{path} says it is one of {said} parts; name the first by the name it was given")
    return GgufHeader(headers[0].content, tensors)


def parts_of(path: Path) -> list[Path]:
    """Return the files that belong to a file of this name, all there. Raises InputRefused."""
    found = _PART.fullmatch(path.name)
    if found is None:
        return [path]
    number = int(found[3])
    if not 1 <= number <= 1000:
        raise InputRefused(f"{path}: its name says {number} parts")
    parts = [path.with_name(f"{found[1]}-{place + 1:05d}-of-{found[3]}.gguf") for place in range(number)]
    for part in parts:
        if not part.is_file():
            raise InputRefused(f"{path} is one of {len(parts)} parts, and {part.name} is not there; get it too")
    return parts


def _read_one(path: Path) -> GgufHeader:
    size = path.stat().st_size
    with path.open("rb") as file:
        walk = _Walk(path, file, size)
        magic = walk.take(4)
        if magic != _MAGIC:
            raise InputRefused(f"{path} is no GGUF file: it starts with {magic!r}")
        version = walk.number("<I")
        if version not in (2, 3):
            raise InputRefused(f"{path}: GGUF version {version} is not read; 2 and 3 are")
        num_tensors, num_keys = walk.number("<Q"), walk.number("<Q")
        # Counts are bounded before the loops that trust them.
        if num_tensors > MAX_TENSORS or num_keys > MAX_KEYS:
            raise DamagedFile(f"{path}: a header of {num_tensors} tensors and {num_keys} keys is none that a model has")
        content: dict[str, Any] = {}
        for _ in range(num_keys):
            key = walk.text()
            # Readers take either of two: what is checked here would not be what is run elsewhere.
            if key in content:
                raise DamagedFile(f"{path}: key {key[:80]!r} is given twice")
            content[key] = walk.value(walk.number("<I"))
        entries = [_entry(walk) for _ in range(num_tensors)]
        alignment = content.get("general.alignment", 32)
        if type(alignment) is not int or alignment not in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
            raise DamagedFile(f"{path}: an alignment of {str(alignment)[:40]}")
        # Offsets count from the first aligned byte behind the table.
        start = -(-walk.place // alignment) * alignment
    return GgufHeader(content, _placed(path, entries, start, alignment, size))


_Entry = tuple[str, tuple[int, ...], int, int]


def _entry(walk: "_Walk") -> _Entry:
    """Read a tensor's line of the table: name, shape, kind, and its place in the data."""
    name, num_axes = walk.text(), walk.number("<I")
    if not _NAME.fullmatch(name) or ".." in name:
        raise DamagedFile(f"{walk.path}: {name[:80]!r} is no name of a tensor")
    if not 1 <= num_axes <= 4:
        raise DamagedFile(f"{walk.path}: tensor {name} has {num_axes} axes")
    sizes = tuple(walk.number("<Q") for _ in range(num_axes))
    if any(size < 1 for size in sizes) or math.prod(sizes) > MAX_NUMBERS:
        raise DamagedFile(f"{walk.path}: tensor {name} has the sizes {sizes}")
    # ggml counts axes from the fastest one, torch from the slowest: the same bytes, read in the other order.
    return name, sizes[::-1], walk.number("<I"), walk.number("<Q")


def _placed(path: Path, entries: list[_Entry], start: int, alignment: int, size: int) -> dict[str, TensorPlace]:
    """Return places that lie in the file, aligned and without overlap. Raises DamagedFile, InputRefused."""
    gguf = gguf_package()
    placed: dict[str, TensorPlace] = {}
    for name, shape, kind, offset in entries:
        if name in placed:
            raise DamagedFile(f"{path}: tensor {name} is there twice")
        if kind not in gguf.GGML_QUANT_SIZES:
            raise InputRefused(f"{path}: tensor {name} is of kind {kind}, which the gguf package does not know")
        numbers, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % numbers or offset % alignment:
            raise DamagedFile(f"{path}: tensor {name} does not fill its blocks of {numbers}, or is not aligned")
        whole = math.prod(shape) // numbers * num_bytes
        if start + offset + whole > size:
            raise DamagedFile(f"{path} is cut short: tensor {name} ends at byte {start + offset + whole} of {size}")
        placed[name] = TensorPlace(path, shape, int(kind), start + offset, whole)
    end, last = 0, ""
    for name, place in sorted(placed.items(), key=lambda pair: pair[1].start):
        if place.start < end:
            raise DamagedFile(f"{path}: tensors {last} and {name} overlap")
        end, last = place.start + place.num_bytes, name
    return placed


class _Walk:
    """Takes a header apart, never more of it than the file has, or a header may have."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.place = path, file, 0
        self.end = min(size, MAX_HEADER)

    def take(self, number: int) -> bytes:
        """Return the next bytes."""
        if number > self.end - self.place:
            raise DamagedFile(f"{self.path}: its header goes on after byte {self.end}")
        self.place += number
        return self.file.read(number)

    def number(self, form: str) -> Any:
        """Return the next number."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        """Return the next text."""
        length = self.number("<Q")
        if length > MAX_TEXT:
            raise DamagedFile(f"{self.path}: a text of {length} bytes in its header")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise DamagedFile(f"{self.path}: a text in its header is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """Return the next value."""
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise DamagedFile(f"{self.path}: a value of kind {kind} in its header")
        value = self.number(_SCALARS[kind])
        return bool(value) if kind == _BOOL else value

    def _array(self) -> list[Any]:
        kind, length = self.number("<I"), self.number("<Q")
        if length > MAX_ENTRIES:
            raise DamagedFile(f"{self.path}: a list of {length} entries in its header")
        if kind == _TEXT:
            return [self.text() for _ in range(length)]
        if kind not in _SCALARS:  # lists of lists, which no model's header has
            raise DamagedFile(f"{self.path}: a list of kind {kind} in its header")
        form = _SCALARS[kind]
        values = struct.unpack(f"<{length}{form[1]}", self.take(length * struct.calcsize(form)))
        return [bool(value) for value in values] if kind == _BOOL else list(values)


__all__ = ["GgufHeader", "TensorPlace", "gguf_package", "parts_of", "read_header"]
