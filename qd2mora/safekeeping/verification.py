"""Whether everything at or below a folder is what was written: runs by their own lists, sealed folders by theirs."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qd2mora.disk.sealed import MANIFEST, read_manifest, verify_folder
from qd2mora.errors import DamagedFile
from qd2mora.safekeeping.inventory import RECIPE, verify_run

_PARTS = ("adapter", "checkpoints", "metrics.jsonl")


@dataclass(frozen=True)
class Verified:
    """A folder that is whole, and what in it could not be compared."""

    folder: Path
    num_bytes: int
    said: tuple[str, ...] = ()


def verified(folder: Path) -> Iterator[Verified]:
    """Yield every run and sealed folder at or below a folder as it is found whole. Raises DamagedFile."""
    if folder.is_symlink() and not folder.exists():
        raise DamagedFile(f"{folder} is a link to nothing")
    for name, folders, files in os.walk(folder):
        place = Path(name)
        folders.sort()
        found = _verified(place, [*folders, *files])
        if found is not None:
            yield found
            folders.clear()
        folders[:] = [each for each in folders if not each.startswith(".")]


def _verified(folder: Path, names: list[str]) -> Verified | None:
    manifest = read_manifest(folder)
    if manifest is None:
        if RECIPE in names and any(part in names for part in _PARTS):
            raise DamagedFile(f"{folder} is a run and lacks {MANIFEST!r}")
        return None
    if "identity" in manifest:
        size, said = verify_run(folder)
        return Verified(folder, size, tuple(said))
    return Verified(folder, verify_folder(folder, lambda name: not name.endswith(".md")))


__all__ = ["Verified", "verified"]
