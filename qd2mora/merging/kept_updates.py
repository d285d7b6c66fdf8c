"""Static updates kept in their run, and what was measured of them: one solution for every rung of the ladder.

An entry of `static/` is a sealed folder: factors, and in its manifest what they were made of: adapter, base, rows,
settings, versions. One that was made of something else, or is damaged, is told in one line and replaced.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors

from qd2mora.adapter_folder import base_identity
from qd2mora.base.passes import device_of
from qd2mora.data import Row
from qd2mora.disk.file_hash import hash_of_bytes
from qd2mora.disk.lock import lock_beside, locked
from qd2mora.disk.sealed import MANIFEST, Manifest, open_manifest, read_listed, seal_folder
from qd2mora.disk.staged import staged_folder
from qd2mora.disk.tensor_file import tensor_at_hand, write_tensors
from qd2mora.errors import DamagedFile, DiskTrouble, InputRefused
from qd2mora.merging.fidelity import Fidelity
from qd2mora.merging.static_updates import Statics
from qd2mora.mixture.low_rank import LowRank
from qd2mora.run_folder import OpenRun
from qd2mora.safekeeping.inventory import noted

FACTORS = "updates.safetensors"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Solution:
    """Static updates by linear, and what the work of making them has to say."""

    strategy: str
    statics: Statics
    calibration_rows: int
    notes: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What held-out rows say of static updates, see `MeasuredUpdates`."""

    bases: dict[str, Fidelity]
    unexplained: dict[str, float]
    notes: dict[str, object]


@dataclass(frozen=True)
class Shelf:
    """Where one run's static updates for one question are kept; `folder` None: nowhere."""

    folder: Path | None
    made_of: dict[str, object]

    @classmethod
    def of(cls, opened: OpenRun, settings: Mapping[str, object], rows: Iterable[Row], *, keeps: bool) -> "Shelf":
        """Return the place of what `settings` ask for: strategy, task, vector and what else the result depends on."""
        # The name tells questions apart; whether what lies there is this one's answer, `made_of` says, which is
        # compared whole.
        asked = json.dumps([settings.get(name) for name in ("strategy", "task", "vector")])
        folder = opened.folder.static / f"{settings['strategy']}-{hash_of_bytes(asked.encode())[:8]}"
        made_of: dict[str, object] = {
            "adapter": hash_of_bytes((opened.folder.adapter / MANIFEST).read_bytes()),
            **base_identity(opened.recipe.base),
            "rows": hash_of_rows(rows),
            "settings": json.loads(json.dumps(settings)),
            # Other versions, devices and dtypes add in another order: a solution, and above all a measurement, would
            # not be this one's.
            "versions": {name: version(name) for name in ("qd2mora", "torch", "peft", "transformers")},
            "device": f"{device_of(opened.model).type}, {opened.model.dtype}",
        }
        return cls(folder if keeps else None, made_of)

    def measured_on(self, rows: Iterable[Row], original: str) -> "Shelf":
        """Return the place of what was measured; `original`: why the original base is not measured, if it is not."""
        folder = self.folder and self.folder.with_name(f"{self.folder.name}-measured")
        return Shelf(folder, {**self.made_of, "held_out": hash_of_rows(rows), "original": original})

    def solution(self, device: torch.device) -> Solution | None:
        """Return the static updates that are kept, where they are whole and made of the same."""
        found = self._found()
        if found is None or self.folder is None:
            return None
        try:
            tensors = load_tensors(read_listed(self.folder, found, FACTORS))
        except DamagedFile as error:
            self._pass_over(str(error))
            return None
        statics = {
            name: LowRank(tensors[f"{name}.down"].to(device), tensors[f"{name}.up"].to(device), *numbers)
            for name, numbers in found["scalings"].items()
        }
        _log.warning("static updates are kept in '%s': taken from there, not made again", self.folder)
        return Solution(found["strategy"], statics, found["calibration_rows"], found["notes"] | {"kept": True})

    def keep(self, solution: Solution) -> None:
        """Keep static updates; a disk that is full or not writable costs a line."""
        tensors: dict[str, torch.Tensor] = {}
        for name, static in solution.statics.items():
            tensors |= {f"{name}.down": static.down, f"{name}.up": static.up}
        self._write(
            {
                "strategy": solution.strategy,
                "scalings": {name: [each.scaling, each.base_change] for name, each in solution.statics.items()},
                "calibration_rows": solution.calibration_rows,
                "notes": solution.notes,
            },
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        )

    def measured(self) -> Measured | None:
        """Return what was measured of the same, where it is kept whole."""
        found = self._found()
        if found is None:
            return None
        bases = {name: _fidelity_of(content) for name, content in found["bases"].items()}
        return Measured(bases, found["unexplained"], found["notes"])

    def keep_measured(self, measured: Measured) -> None:
        """Keep what was measured."""
        bases = {name: asdict(fidelity) for name, fidelity in measured.bases.items()}
        self._write({"bases": bases, "unexplained": measured.unexplained, "notes": measured.notes}, {})

    def _found(self) -> Manifest | None:
        if self.folder is None or not self.folder.is_dir():
            return None
        try:
            found = open_manifest(self.folder)
        except DamagedFile as error:
            self._pass_over(str(error))
            return None
        there = found.get("made_of")
        there = there if isinstance(there, dict) else {}
        other = next((name for name in self.made_of if there.get(name) != self.made_of[name]), None)
        if other is not None:
            self._pass_over(f"'{self.folder}' was made of another '{other}'")
            return None
        return found

    def _pass_over(self, problem: str) -> None:
        _log.warning("static updates that are kept: %s; they are made and measured anew", problem)

    def _write(self, content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        if self.folder is None:
            return
        try:
            self.folder.parent.mkdir(exist_ok=True)
            with (
                noted(self.folder),
                locked(lock_beside(self.folder)),
                staged_folder(self.folder, (FACTORS, MANIFEST)) as stage,
            ):
                files = {}
                if tensors:
                    entries = [tensor_at_hand(name, tensor) for name, tensor in tensors.items()]
                    files = {FACTORS: write_tensors(stage / FACTORS, entries)}
                seal_folder(stage, files, {"kind": "static", "made_of": self.made_of, **content})
        except (OSError, ValueError, InputRefused, DamagedFile, DiskTrouble) as error:
            _log.warning("static updates are not kept in '%s': %s", self.folder, error)


def hash_of_rows(rows: Iterable[Row]) -> str:
    """Return a hash of rows as tokens, in their order, with what of them is learned."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.task} {len(row.ids)} {row.masked} {row.earlier} {row.pair.vector};".encode())
        digest.update(row.ids.tobytes())
    return digest.hexdigest()


def _fidelity_of(content: Mapping[str, Any]) -> Fidelity:
    tasks = {name: _fidelity_of(each) for name, each in content["tasks"].items()}
    return Fidelity(**{**content, "tasks": tasks})


__all__ = ["FACTORS", "Measured", "Shelf", "Solution", "hash_of_rows"]
