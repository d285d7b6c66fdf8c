"""Writing to disk so that a kill or a power cut leaves the old state or the new one, never a mixture.

The order is always: write, force each file, force the folder that names them, rename, force the parent. Every call that
changes the disk is a plain `os` call, so that a test can record them and build each state a power cut may leave.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from qd2mora.disk.file_hash import SizeAndHash
from qd2mora.redact import redacted


class Saves(Protocol):
    """What transformers, PEFT and tokenizers write by themselves: a model, a configuration, a tokenizer."""

    save_pretrained: Callable[[str], object]


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> SizeAndHash:
    """Write a new file and force it to disk; return its size and the SHA-256 of what was meant to be written."""
    digest, size = hashlib.sha256(), 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            digest.update(view)
            size += len(view)
            while view:  # a write may be short
                view = view[os.write(handle, view) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    return SizeAndHash(size, digest.hexdigest())


def write_atomically(path: Path, text: str) -> None:
    """Write a text file through a temporary name and a rename."""
    partial = path.with_name(f".{path.name}.partial")
    write_file(partial, [redacted(text, named=False).encode()])
    os.replace(partial, path)
    sync_folder(path.parent)


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically, indented."""
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def save_pretrained(what: Saves, folder: Path) -> None:
    """Let a library write its files. Raises OSError also where it writes in Rust, whose errors are of other types.

    safetensors has a type of its own for them, tokenizers raises bare ones; both quote the number that the system gave.
    """
    try:
        what.save_pretrained(str(folder))
    except BaseException as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError) or number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield a fresh folder beside `target`; it takes target's place in one rename when the block ends well.

    Whatever stood there stays whole until then; where the block fails, nothing is left behind.
    """
    stage = stage_of(target)
    # What a killed process left under this name is half of something.
    shutil.rmtree(stage, ignore_errors=True)
    os.makedirs(stage)
    try:
        yield stage
        _sync_below(stage)
        _publish(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def stage_of(target: Path) -> Path:
    """Return where a folder is made before it takes its name."""
    return target.with_name(f".{target.name}.partial")


def remove_folder(folder: Path) -> None:
    """Remove a folder; it loses its name first, so that no half of it is ever found under it."""
    dead = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(dead, ignore_errors=True)
    os.rename(folder, dead)
    sync_folder(folder.parent)
    shutil.rmtree(dead, ignore_errors=True)


def sync_folder(path: Path) -> None:
    """Force a folder's list of names to disk."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync_below(stage: Path) -> None:
    for folder, _, names in os.walk(stage, topdown=False):
        for name in names:  # a library may have written some without forcing them
            _sync(Path(folder) / name, os.O_RDONLY)
        sync_folder(Path(folder))


def _publish(stage: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    # A folder cannot be renamed onto one that holds files; between the two renames, what was there has another name.
    if target.exists():
        os.rename(target, old)
    os.rename(stage, target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


__all__ = [
    "remove_folder",
    "save_pretrained",
    "stage_of",
    "staged_folder",
    "sync_folder",
    "write_atomically",
    "write_file",
    "write_json",
]
