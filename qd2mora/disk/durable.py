"""Writing to disk so that a kill or a power cut leaves the old state or the new one, never a mixture.

The order is always: write, force each file, force the folder that names them, rename, force the parent. Every call that
changes the disk is a plain `os` call, so that a test can record them and build each state a power cut may leave.

What is being made has a name that no other process and no user gives, see `passing`; folders are made in `staged`.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from qd2mora.disk.file_hash import SizeAndHash
from qd2mora.disk.passing import passing_name, remove_left_behind
from qd2mora.disk.systems import force_file, force_folder, open_new
from qd2mora.redact import redacted_values


class Saves(Protocol):
    """What transformers, PEFT and tokenizers write by themselves: a model, a configuration, a tokenizer."""

    save_pretrained: Callable[[str], object]


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> SizeAndHash:
    """Write a new file and force it to disk; return its size and the SHA-256 of what was meant to be written."""
    # Of what was given, not of what the disk has: a seal is to catch a disk that gives back something else.
    digest, size = hashlib.sha256(), 0
    handle = open_new(path)
    try:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            digest.update(view)
            size += len(view)
            while view:  # a write may be short
                view = view[os.write(handle, view) :]
        # Before the name is given (a rename comes after): no name may ever lead to bytes that are only in the system's
        # cache.
        os.fsync(handle)
    finally:
        os.close(handle)
    return SizeAndHash(size, digest.hexdigest())


def write_atomically(path: Path, text: str) -> None:
    """Write a text file through a name of its own and a rename; whoever writes what others said redacts it before."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write a file through a name of its own and a rename."""
    # Of a process that was killed in here: nobody else will.
    remove_left_behind(path)
    partial = passing_name(path)
    try:
        write_file(partial, [content])
        os.replace(partial, path)
    # A signal too: whatever ends this, no partial file is left by a process that lives on.
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(partial)
        raise
    # Until the folder is forced as well, a power cut may bring the old name back.
    sync_folder(path.parent)


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically, indented; no value holds a secret, and no key is ever touched."""
    write_atomically(path, json.dumps(redacted_values(content), indent=1) + "\n")


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


def sync_folder(path: Path) -> None:
    """Force a folder's list of names to disk."""
    force_folder(path)


def sync_file(path: Path) -> None:
    """Force a file that a library wrote to disk."""
    force_file(path)


__all__ = [
    "save_pretrained",
    "sync_file",
    "sync_folder",
    "write_atomically",
    "write_bytes_atomically",
    "write_file",
    "write_json",
]
