"""4-bit weights on disk, so that a later start reads them instead of quantising the base again.

An entry is a sealed folder in the layout of a pre-quantised model: config.json and safetensors in shards. Its manifest
says what it was made of: the hash of the base, the settings, the versions. An entry made of something else is stale,
one whose bytes are not those that were written is damaged; either is told in one line and left alone until a run
replaces it. Readers share a lock, a writer has it alone; where it is taken, nothing is written.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from qd2mora.disk.file_hash import hash_of_bytes, short_hash
from qd2mora.disk.sealed import MANIFEST, open_manifest, seal_whole_folder, verify_folder
from qd2mora.disk.shards import write_shards
from qd2mora.disk.staged import staged_folder
from qd2mora.disk.systems import lock_alone, lock_with_readers, open_lock
from qd2mora.disk.tensor_file import tensor_at_hand
from qd2mora.errors import DamagedFile, InputRefused

SHARD_BYTES = 256 << 20
"""Of one file: several are hashed side by side when they are read."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedWeights:
    """One base's weights in a cache; `made_of` is what they must have been made of."""

    folder: Path
    made_of: dict[str, object]

    @classmethod
    def of(cls, cache: Path, model: str, settings: dict[str, object], content: dict[str, object]) -> "CachedWeights":
        """Return the entry of a model in some settings, each of which has its own; `content` may change under it."""
        # `content` is no part of the name: a base that changed replaces its old weights, and does not stand beside.
        text = json.dumps({"model": model, **settings}, sort_keys=True)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rpartition("/")[2])[:60].strip(".-")
        folder = cache / f"{name}-{hash_of_bytes(text.encode())[:12]}"
        return cls(folder, {**settings, **content})

    @contextmanager
    def opened(self) -> Iterator[bool]:
        """Tell whether the weights are there and whole, and keep them from being replaced while the block runs."""
        if not self.folder.is_dir():
            yield False
            return
        with self._shared():
            yield self._is_whole()

    def write(self, tensors: dict[str, Tensor], configs: Callable[[Path], object]) -> None:
        """Put weights in the place of what is there; `configs` writes the model's configuration into a folder.

        A disk that is full or not writable costs a line, and no more.
        """
        size = sum(tensor.nbytes for tensor in tensors.values())
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.folder.parent).free < 2 * size:  # the run itself has something to write
                self._say_not_kept(f"its disk is short of room for {size / 2**30:.1f} GiB")
                return
            with self._alone(), staged_folder(self.folder, self._names()) as stage:
                configs(stage)
                entries = [tensor_at_hand(name, tensor) for name, tensor in tensors.items()]
                files = write_shards(stage, entries, SHARD_BYTES)
                seal_whole_folder(stage, files, {"made_of": self.made_of})
        except BlockingIOError:
            return  # another process is at it, or reads what is there
        except InputRefused as error:  # somebody else's folder, or file, of that name
            self._say_not_kept(str(error))
        except OSError as error:
            self._say_not_kept(error.strerror or str(error))

    def say_made_anew(self, problem: str) -> None:
        """Say why weights are quantised although there are some."""
        _log.warning("base.cache: %s; the base is quantised anew", problem)

    def _is_whole(self) -> bool:
        try:
            made_of = open_manifest(self.folder).get("made_of")
            there = made_of if isinstance(made_of, dict) else {}
            other = [name for name in self.made_of if there.get(name) != self.made_of[name]]
            if not other:
                verify_folder(self.folder)
                return True
        except DamagedFile as error:
            self.say_made_anew(str(error))
            return False
        was, now = (short_hash(str(content.get(other[0]))) for content in (there, self.made_of))
        self.say_made_anew(f"'{self.folder}' was made with {other[0]} {was}, and now it is {now}")
        return False

    @contextmanager
    def _shared(self) -> Iterator[None]:
        """Hold the entry's lock with other readers; none where a disk cannot be written, and so nothing be replaced."""
        try:
            handle = open_lock(self._lock)
        except OSError:
            yield
            return
        try:
            lock_with_readers(handle)
            yield
        finally:
            os.close(handle)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the entry's lock for a writer. Raises BlockingIOError where another process has it, and OSError."""
        handle = open_lock(self._lock)
        try:
            if not lock_alone(handle):
                raise BlockingIOError(str(self._lock))
            yield
        finally:
            os.close(handle)

    @property
    def _lock(self) -> Path:
        # Beside the entry, which is replaced under it, and never removed: else two could hold locks of one name.
        return self.folder.with_name(f".{self.folder.name}.lock")

    def _names(self) -> set[str]:
        """Return what an entry may hold whose manifest is damaged: it is replaced all the same."""
        weights = {path.name for path in self.folder.glob("model*.safetensors*")}
        return {"config.json", "generation_config.json", MANIFEST, *weights}

    def _say_not_kept(self, why: str) -> None:
        _log.warning("base.cache: 4-bit weights are not kept in '%s': %s", self.folder.parent, why)


__all__ = ["CachedWeights"]
