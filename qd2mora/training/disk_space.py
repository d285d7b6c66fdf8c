"""Room on disk: asked for before the start, and told plainly when it runs out."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qd2mora.base.files import is_gguf, weight_files
from qd2mora.errors import DiskTrouble
from qd2mora.memory.plan import Plan
from qd2mora.recipe import Recipe
from qd2mora.recipe.optimizers import OPTIMIZERS

MIB = 1 << 20
_CANNOT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def refuse_full(folder: Path, needed: int) -> None:
    """Compare what a run will write with what is free to this user. Raises DiskTrouble."""
    # The run's folder is not made yet; the nearest that is there lies on the same disk.
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise DiskTrouble(
            f"disk: '{folder}' needs {needed / MIB:,.1f} MiB for checkpoints and adapter, {free / MIB:,.1f} MiB are "
            f"free; {needed - free} bytes are missing: make room, or keep fewer (train.keep_checkpoints)"
        )


def checkpoint_bytes(planned: Plan) -> int:
    """Return about what one checkpoint takes: parameters and two moments, float32, or of 8 bits where they are."""
    moment = OPTIMIZERS[planned.layout.optimizer].moment_bytes
    return int(planned.trainable_parameters * (4 + 2 * moment)) + MIB


def bytes_to_write(recipe: Recipe, planned: Plan) -> int:
    """Return what a run writes: all its checkpoints at once, the one being written too, adapters, a wanted export."""
    export = 0
    if recipe.finish.export:
        export = sum(path.stat().st_size for path in weight_files(recipe.base.model))
        if is_gguf(recipe.base.model):  # of 4 bits or so a number, which leaves in 16
            export *= 4
    # The result, and the best: there, about to be, and where every task has its own, those.
    adapters = {"none": 1, "overall": 3, "tasks": 3 + len(recipe.data.tasks)}[recipe.train.keep_best]
    checkpoints = (recipe.train.keep_checkpoints + 1) * checkpoint_bytes(planned)
    return checkpoints + adapters * planned.items["adapters"] + export


def take_and_give_back(folder: Path, size: int) -> None:
    """Take the room of a file without writing it: a quota or a limit on files is no part of what a disk says is free.

    A file system that cannot do that is not asked, nor a system that has no word for it. Raises OSError.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise


@contextmanager
def as_trouble(what: str, folder: Path) -> Iterator[None]:
    """Turn the disk's errors into one line and exit code 5. Raises DiskTrouble."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        if error.errno in _FULL:
            why = "no space left"
        raise DiskTrouble(
            f"{what} could not be written to '{folder}': {why}; earlier checkpoints are whole: make room and --resume"
        ) from error


__all__ = ["as_trouble", "bytes_to_write", "checkpoint_bytes", "refuse_full", "take_and_give_back"]
