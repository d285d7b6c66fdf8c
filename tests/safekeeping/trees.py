"""Folders as tests compare, damage and fill them."""

import hashlib
import os
import shutil
from pathlib import Path

FOREIGN = b"years of work"


def copied(source: Path, target: Path) -> Path:
    """Return a fresh copy of a folder."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)
    return target


def content(folder: Path) -> dict[str, str]:
    """Return every path below a folder with a hash of what it is; a file that a lock left behind is told too."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found


def put(kind: str, place: Path) -> None:
    """Put something that is nobody's but the user's at a place."""
    if kind == "file":
        place.write_bytes(FOREIGN)
    elif kind == "folder":
        place.mkdir()
        (place / "thesis.tex").write_bytes(FOREIGN)
    elif kind == "link":
        place.symlink_to("/etc/hostname")
    else:
        os.mkfifo(place)


def flipped(path: Path, place: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << place % 8
    path.write_bytes(data)
