"""What may be removed or replaced: only what a sealed manifest of ours lists, and names that its kind of folder has.

Nothing is told by one generic file name: a folder with a `plan.json` or a `recipe.yaml` in it may be anybody's.
"""

import os
from collections.abc import Collection
from pathlib import Path

from qd2mora.disk.passing import is_passing
from qd2mora.disk.sealed import MANIFEST, listed_names
from qd2mora.errors import DamagedFile, InputRefused


def foreign_in(folder: Path, names: Collection[str] = ()) -> Path | None:
    """Return what of a flat folder is not ours: neither listed in its manifest nor one of `names`; None: all is.

    A link, and a folder below, is never ours. What is not there holds nothing foreign.
    """
    if not os.path.lexists(folder):
        return None
    if folder.is_symlink() or not folder.is_dir():
        return folder
    known = {*names}
    try:
        known |= {MANIFEST, *listed_names(folder)}
    # No manifest of ours, or a changed one, vouches for nothing: then only names of this kind of folder are known.
    except DamagedFile:
        pass
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if is_passing(entry.name):
            continue
        if entry.name not in known or not entry.is_file(follow_symlinks=False):
            return folder / entry.name
    return None


def refuse_foreign(folder: Path, names: Collection[str] = ()) -> None:
    """Refuse to remove or replace a folder that is not all ours. Raises InputRefused."""
    foreign = foreign_in(folder, names)
    if foreign is not None:
        raise InputRefused(
            f"'{folder}' is not removed: '{foreign}' was not written with it; move that elsewhere, or remove the "
            "folder yourself"
        )


__all__ = ["foreign_in", "refuse_foreign"]
