"""What a rung of the ladder of exports is: how its folder is written, in which dtypes, and what it can not hold.

A rung is a file with a `RUNG` in it and a row in the table of `rungs`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qd2mora.disk.file_hash import SizeAndHash
from qd2mora.merging.base_weights import BaseWeights
from qd2mora.merging.static_updates import Statics
from qd2mora.run_folder import OpenRun

SHARD_BYTES = 5 * 10**9


@dataclass
class Written:
    """What a rung wrote: its large files, and the rounding of each changed weight relative to its update."""

    files: dict[str, SizeAndHash] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    """Of a quantised file: how many tensors are of each kind."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the files."""
        return sum(file.num_bytes for file in self.files.values())


@dataclass(frozen=True)
class ExportForm:
    """What an export is written as: the rung, the base's weights, their dtype, and the size of a file.

    `with_vocabulary`: whether a GGUF file holds a tokenizer, or takes and gives token ids alone.
    """

    to: str
    rung: "Rung"
    base: str = "dequantized"
    dtype: str = "float16"
    limit: int = SHARD_BYTES
    with_vocabulary: bool = True

    @property
    def is_routed(self) -> bool:
        """Whether the routed adapter itself goes along, so that nothing is made static."""
        return self.rung.is_routed

    @property
    def is_measured_as_written(self) -> bool:
        """Whether its rounding is too much to be left out: the file itself is read back and measured."""
        return self.dtype in self.rung.measured


WriteFolder = Callable[[Path], Written]
"""Writes an export into an existing folder. Raises NotFinite, OSError."""


@dataclass(frozen=True)
class Rung:
    """One way out; the first of its dtypes is the default.

    `prepare` takes from a run what the export needs and nothing more, so that the model may go before the writing;
    `refuse_unfit` raises InputRefused, before the work begins, where a base or an adapter cannot be written so.
    """

    prepare: Callable[[OpenRun, BaseWeights, Statics, ExportForm], WriteFolder]
    dtypes: tuple[str, ...]
    refuse_unfit: Callable[[OpenRun, BaseWeights, ExportForm], object] = lambda opened, weights, form: None
    is_routed: bool = False
    holds_no_base: bool = False
    has_shards: bool = False
    may_lack_vocabulary: bool = False
    measured: tuple[str, ...] = ()
    """Dtypes whose files are measured as they were written."""


__all__ = ["SHARD_BYTES", "ExportForm", "Rung", "WriteFolder", "Written"]
