"""The one hash of a file, SHA-256: what manifests list, bases are told apart by, and caches are found under."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple


class SizeAndHash(NamedTuple):
    """What is to stand on disk: a file's bytes counted and its SHA-256 in hexadecimal."""

    num_bytes: int
    sha256: str


def hash_of_bytes(content: bytes) -> str:
    """Return the SHA-256 of bytes at hand."""
    return hashlib.sha256(content).hexdigest()


def hash_of_file(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes_of_files(paths: Sequence[Path]) -> Iterator[str]:
    """Yield the SHA-256 of files in their order; several are read at once, at about 1 GB/s each. Raises OSError."""
    with ThreadPoolExecutor(min(len(paths), os.cpu_count() or 1) or 1) as pool:
        yield from pool.map(hash_of_file, paths)


def size_and_hash(path: Path) -> SizeAndHash:
    """Return what a file that a library wrote holds. Raises OSError."""
    return SizeAndHash(path.stat().st_size, hash_of_file(path))


def short_hash(value: str) -> str:
    """Return a value as people read it in a line: of a hash, the beginning."""
    if len(value) == 64:
        return value[:12]
    return value


__all__ = ["SizeAndHash", "hash_of_bytes", "hash_of_file", "hashes_of_files", "short_hash", "size_and_hash"]
