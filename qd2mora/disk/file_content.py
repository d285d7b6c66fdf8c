"""What a file is by its content, whatever its name says: JSON without double keys; no pickle, archive or program."""

import json
from pathlib import Path

from qd2mora.errors import DamagedFile, InputRefused

CONVERT = "convert it once, where it may be trusted, with save_pretrained(..., safe_serialization=True)"
_MAGIC = {
    b"PK": "a zip archive, as torch.save writes it, with a pickle inside",
    b"\x80": "a Python pickle",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x1f\x8b": "a gzip file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"Rar!": "a rar archive",
    b"GGUF": "a GGUF file",
    b"\x89PNG": "a picture",
    b"\x93NUMPY": "a numpy file",
    b"\x89HDF": "an HDF5 file",
    b"\x7fELF": "a program",
    b"#!": "a program",
}

JsonObject = dict[str, object]


def refuse_by_magic(path: Path, start: bytes) -> None:
    """Refuse a file whose first bytes tell another kind. Raises InputRefused."""
    for magic, kind in _MAGIC.items():
        if start.startswith(magic):
            raise InputRefused(f"{path} is {kind}, whatever its name says; {CONVERT}")


def json_object(content: bytes, path: Path) -> JsonObject:
    """Parse a JSON object; of a key that stands twice another reader may take the other value. Raises DamagedFile."""
    try:
        parsed = json.loads(content, object_pairs_hook=lambda pairs: _without_twins(pairs, path))
    except RecursionError as error:
        raise DamagedFile(f"{path} is nested too deeply") from error
    except ValueError as error:
        raise DamagedFile(f"{path} is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise DamagedFile(f"{path} is no JSON object")
    return parsed


def _without_twins(pairs: list[tuple[str, object]], path: Path) -> JsonObject:
    # Python's reader takes the last of two, others the first: a check of one would say nothing of the other.
    if len({key for key, _ in pairs}) < len(pairs):
        raise DamagedFile(f"{path}: a key is given twice")
    return dict(pairs)


__all__ = ["CONVERT", "JsonObject", "json_object", "refuse_by_magic"]
