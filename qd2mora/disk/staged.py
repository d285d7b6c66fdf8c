"""Folders that appear whole or not at all, and go whole: made under a passing name, and renamed.

What stands at a name is replaced or removed only where it is all ours, see `owned`.
"""

import errno
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from qd2mora.disk.durable import sync_file, sync_folder
from qd2mora.disk.owned import refuse_foreign
from qd2mora.disk.passing import OLD, passing_name, remove_left_behind, remove_passing
from qd2mora.errors import InputRefused


@contextmanager
def staged_folder(target: Path, replaces: Collection[str] | None = None) -> Iterator[Path]:
    """Yield a fresh folder beside `target`; it takes target's place in one rename when the block ends well.

    `replaces`: what stands at the target may be replaced where it is all ours, these names besides what its manifest
    lists; None: nothing is ever replaced. Whatever stood there stays whole until then; where the block fails, nothing
    is left behind. Raises InputRefused where something foreign stands there.
    """
    if replaces is not None:
        refuse_foreign(target, replaces)
    remove_left_behind(target)
    stage = passing_name(target)
    # Beside the target, not in /tmp: a rename is one step only within a file system.
    os.makedirs(stage)
    try:
        yield stage
        # Contents and inner lists first, the name last: after a power cut the target is whole, or is what it was.
        _sync_below(stage)
        _publish(stage, target, replaces)
        remove_left_behind(target, OLD)  # not sooner: after a kill it may be all that there is
    finally:
        remove_passing(stage)


def remove_folder(folder: Path, names: Collection[str] = ()) -> None:
    """Remove a folder that is all ours; it loses its name first, so that no half of it is ever found under it.

    `names`: what belongs to it besides what its manifest lists. Raises InputRefused where it holds anything else.
    """
    refuse_foreign(folder, names)
    dead = passing_name(folder, OLD)
    os.rename(folder, dead)
    sync_folder(folder.parent)
    remove_passing(dead)


def _sync_below(stage: Path) -> None:
    # From the bottom up: a folder's list is forced when all that it names is on disk.
    for folder, _, names in os.walk(stage, topdown=False):
        for name in names:  # a library may have written some without forcing them
            sync_file(Path(folder) / name)
        sync_folder(Path(folder))


def _publish(stage: Path, target: Path, replaces: Collection[str] | None) -> None:
    old = None
    if replaces is not None and os.path.lexists(target):
        refuse_foreign(target, replaces)
        # A folder cannot be renamed onto one that holds files; between two renames, what was there has another name.
        old = passing_name(target, OLD)
        os.rename(target, old)
    _take_name(stage, target)
    sync_folder(target.parent)
    if old is not None:
        remove_passing(old)


def _take_name(stage: Path, target: Path) -> None:
    """Rename onto nothing, or an empty folder: onto one that holds anything, or a file, that never succeeds."""
    try:
        _rename_onto_empty(stage, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise InputRefused(f"'{target}' was made by somebody else meanwhile; nothing is replaced") from None


def _rename_onto_empty(stage: Path, target: Path) -> None:
    try:
        os.rename(stage, target)
    except FileExistsError:  # Windows renames onto nothing at all
        os.rmdir(target)
        os.rename(stage, target)


__all__ = ["remove_folder", "staged_folder"]
