"""Folders that cannot lie: a manifest, written last, holds the size and hash of every file and a hash of itself.

A manifest is JSON in one fixed form; it is read by parsing it, writing it again and comparing bytes, so that any
changed bit is seen, in a space as in a number.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qd2mora.disk.durable import write_file
from qd2mora.disk.file_hash import SizeAndHash, hash_of_bytes, size_and_hash
from qd2mora.disk.systems import open_plain
from qd2mora.errors import DamagedFile

MANIFEST = "manifest.json"
_MAX_MANIFEST_BYTES = 16 << 20
_HASH = "sha256"

Manifest = dict[str, Any]
"""What JSON holds; whoever reads a field checks it."""


def seal_text(content: Mapping[str, object]) -> str:
    """Return a mapping as JSON that carries its own hash. Raises ValueError for numbers that JSON cannot hold."""
    # Sorted and without NaN: the same content is the same bytes, and any JSON reader takes them.
    body = json.dumps(content, sort_keys=True, indent=1, allow_nan=False)
    sealed = {**content, _HASH: hash_of_bytes(body.encode())}
    return json.dumps(sealed, sort_keys=True, indent=1, allow_nan=False) + "\n"


def unseal_text(text: bytes, where: str) -> Manifest:
    """Return what `seal_text` was given. Raises DamagedFile where one byte differs."""
    try:
        content = json.loads(text)
        del content[_HASH]
        # Written again and compared: a changed space, or a number written in another way, counts as damage too.
        is_whole = seal_text(content).encode() == text
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedFile(f"{where} is damaged: {error}") from error
    if not is_whole:
        raise DamagedFile(f"{where} is not what was written")
    return content


def seal_folder(folder: Path, files: Mapping[str, tuple[int, str]], content: Mapping[str, object]) -> None:
    """Write the manifest of a folder whose `files`, name to size and hash, are all on disk."""
    listed = {name: {"bytes": size, _HASH: digest} for name, (size, digest) in files.items()}
    write_file(folder / MANIFEST, [seal_text({**content, "files": listed}).encode()])


def seal_whole_folder(folder: Path, written: Mapping[str, SizeAndHash], content: Mapping[str, object]) -> None:
    """Write a folder's manifest: of files `written` here, what was meant to be written; of the rest, what is there."""
    rest = [path for path in sorted(folder.iterdir()) if path.name not in written and path.name != MANIFEST]
    seal_folder(folder, dict(written) | {path.name: size_and_hash(path) for path in rest}, content)


def listed_names(folder: Path) -> set[str]:
    """Return the names of the files that a folder's manifest lists. Raises DamagedFile where it has none of ours."""
    listed = unseal_text(_read_at_most(folder / MANIFEST, _MAX_MANIFEST_BYTES), str(folder / MANIFEST)).get("files")
    if not isinstance(listed, dict):
        raise DamagedFile(f"{folder / MANIFEST} lists no files")
    return set(listed)


def open_manifest(folder: Path, is_foreign: Callable[[str], bool] = lambda name: True) -> Manifest:
    """Return a sealed folder's manifest after comparing its list of files with what is there.

    `is_foreign` says of a name that is not listed whether it is out of place. Raises DamagedFile.
    """
    content = unseal_text(_read_at_most(folder / MANIFEST, _MAX_MANIFEST_BYTES), str(folder / MANIFEST))
    listed = content.get("files")
    if not isinstance(listed, dict):
        raise DamagedFile(f"{folder / MANIFEST} lists no files")
    # Names now, contents when they are read: a folder of 100 GB opens at once.
    there = {entry.name for entry in os.scandir(folder)} - {MANIFEST}
    for name in sorted(listed.keys() - there):
        raise DamagedFile(f"{folder} lacks {name!r}")
    for name in sorted(there - listed.keys()):
        if is_foreign(name):
            raise DamagedFile(f"{folder} holds {name!r}, which was not written with it")
    return content


def read_listed(folder: Path, manifest: Manifest, name: str) -> bytes:
    """Return the bytes of a listed file: what is checked is what is used. Raises DamagedFile."""
    entry = manifest["files"].get(name)
    if entry is None:
        raise DamagedFile(f"{folder / MANIFEST} does not list {name!r}")
    # Hashed from the bytes that are returned: read twice, a file could change in between.
    content = _read_at_most(folder / name, entry["bytes"])
    if len(content) != entry["bytes"] or hash_of_bytes(content) != entry[_HASH]:
        raise DamagedFile(f"{folder / name} is not what was written")
    return content


def verify_folder(folder: Path, is_foreign: Callable[[str], bool] = lambda name: True) -> int:
    """Read every file of a sealed folder back from disk, without holding it in memory; return the bytes.

    `is_foreign` as for `open_manifest`. Raises DamagedFile.
    """
    files = open_manifest(folder, is_foreign)["files"]
    paths = [folder / name for name in files]
    # hashlib lets go of the interpreter's lock: shards are hashed side by side.
    with ThreadPoolExecutor(min(len(paths), os.cpu_count() or 1) or 1) as pool:
        for path, found in zip(paths, pool.map(hash_of_plain_file, paths), strict=True):
            entry = files[path.name]
            if found != (entry["bytes"], entry[_HASH]):
                raise DamagedFile(f"{path} is not what was written")
    return sum(entry["bytes"] for entry in files.values())


def verify_where_ours(folder: Path) -> None:
    """Read a folder that one of our manifests seals before it is used; others' folders are as they are.

    Raises DamagedFile.
    """
    manifest = read_manifest(folder)
    if manifest is not None and "files" in manifest:
        verify_folder(folder, lambda name: not name.endswith(".md"))


def read_manifest(folder: Path) -> Manifest | None:
    """Return what a manifest of ours says; None where there is none, or somebody else's. Raises DamagedFile."""
    if not os.path.lexists(folder / MANIFEST):
        return None
    text = _read_at_most(folder / MANIFEST, _MAX_MANIFEST_BYTES)
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or not {_HASH, "files", "kind", "identity"} & content.keys():
            return None  # other programs have a manifest.json too; one changed bit does not make ours one of those
    # No JSON at all may be ours with a changed byte: unsealing says what is wrong with it.
    except (ValueError, RecursionError):
        pass
    return unseal_text(text, str(folder / MANIFEST))


def hash_of_plain_file(path: Path) -> SizeAndHash:
    """Return what a file holds: no link is followed, no pipe waited for. Raises DamagedFile."""
    try:
        handle = open_plain(path)
        with os.fdopen(handle, "rb") as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise DamagedFile(f"{path} is not an ordinary file")
            return SizeAndHash(state.st_size, hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror}") from error


def _read_at_most(path: Path, limit: int) -> bytes:
    """Read at most one byte more than `limit`: a file that grew cannot fill the memory."""
    try:
        # No link is followed out of the folder, and a pipe in a file's place does not make us wait.
        handle = open_plain(path)
        with os.fdopen(handle, "rb") as file:
            return file.read(limit + 1)
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror}") from error


__all__ = [
    "MANIFEST",
    "Manifest",
    "hash_of_plain_file",
    "listed_names",
    "open_manifest",
    "read_listed",
    "read_manifest",
    "seal_folder",
    "seal_text",
    "seal_whole_folder",
    "unseal_text",
    "verify_folder",
    "verify_where_ours",
]
