"""Merging: a run becomes plain weights, and a report of what they keep.

Static methods (LoRA, MoSLoRA) merge exactly; methods routed by task merge exactly for one task; methods routed by token
are replaced by the static updates of a strategy, and the loss of fidelity is measured on held-out rows.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qd2mora.errors import InputRefused
from qd2mora.merging.fidelity import Fidelity
from qd2mora.merging.making import Made, constant_mixing, make_static, measure_routed
from qd2mora.merging.rungs import Form, form_of, open_source, prepare_rung, seal
from qd2mora.merging.strategies import STRATEGIES, find_strategy
from qd2mora.merging.writer import Written
from qd2mora.mixture.presets import find_method
from qd2mora.run_folder import open_run, read_recipe, refuse_taken, staged_folder, write_json

DEFAULT = "auto"


@dataclass(frozen=True)
class Export:
    """What a merge made, and how near it is to the routed model."""

    folder: Path
    made: Made
    written: Written
    form: Form

    @property
    def strategy(self) -> str:
        return self.made.strategy

    @property
    def exact(self) -> bool:
        return self.made.exact

    @property
    def unexplained(self) -> dict[str, float]:
        return self.made.unexplained

    @property
    def fidelity(self) -> Fidelity | None:
        """How near the export is on the base that it was written on."""
        return self.made.bases.get(self.form.base)

    def to_json(self) -> dict[str, Any]:
        """Return the content of `export_report.json`."""
        unmeasured = {"loss": None, "gain_kept": None, "kl_per_token": None, "held_out_tokens": 0}
        return {
            "to": self.form.to,
            "base": self.form.base,
            "dtype": self.form.dtype,
            "measured": "as written" if self.form.dtype == "nf4" else f"before rounding to {self.form.dtype}",
            "strategy": self.strategy,
            "exact": self.exact,
            "task": self.made.task,
            **(self.fidelity.to_json() if self.fidelity else unmeasured),
            "bases": {name: each.to_json() for name, each in self.made.bases.items()},
            "calibration_rows": self.made.calibration_rows,
            "notes": self.made.notes,
            "seconds": self.made.seconds,
            "modules": {
                name: {"unexplained": share, "rounding": self.written.rounding.get(name, 0.0)}
                for name, share in self.unexplained.items()
            },
            "bytes": self.written.num_bytes,
            "files": [file.name for file in self.written.files],
        }


def merge(
    run: str | Path,
    out: str | Path,
    *,
    strategy: str = DEFAULT,
    task: str | None = None,
    vector: list[float] | None = None,
    to: str = "hf",
    base: str = "dequantized",
    dtype: str | None = None,
    max_shard: str | None = None,
    with_vocabulary: bool = True,
    allow_changed: Collection[str] = (),
) -> Export:
    """Export a run as a folder `out`, with `export_report.json` and a sealed `manifest.json` in it.

    `to`: the rung of the ladder, see `rungs`: `hf` plain weights, `lora` a PEFT LoRA, `exact` the routed model itself.
    `base`: the weights that training saw, or the original ones. `dtype`: of the weights, one of the rung's.
    `task`: export for this task alone: calibration and measuring use its rows; needed where the method routes by task.
    `vector`: export for rows that bring this vector, where the method reads one.

    Raises InputRefused, also where the base is not the one trained on and `allow_changed` does not name it, and
    DamagedFile; `out` appears whole or not at all.
    """
    find_strategy(strategy)
    form = form_of(to, base, dtype, max_shard, with_vocabulary)
    refuse_taken(Path(out), "--out")
    if form.is_routed and strategy != DEFAULT:
        raise InputRefused(f"--strategy: --to {to} keeps the routing, nothing is made static; leave it out")
    if not form.is_routed:
        _check_placement(run)
    opened = open_run(run, allow_changed=allow_changed)
    source = open_source(opened, form)
    made = measure_routed(opened, task, vector) if form.is_routed else make_static(opened, strategy, task, vector)
    write = prepare_rung(opened, source, made.statics, form)
    del opened  # the writing needs one weight at a time
    with staged_folder(Path(out)) as stage:
        written = write(stage)
        export = Export(Path(out), made, written, form)
        write_json(stage / "export_report.json", export.to_json())
        seal(stage, written, source.base)
    return export


def merge_tasks(run: str | Path, out: str | Path, **options: Any) -> dict[str, Export]:
    """Export a run once for each of its tasks, into `out`/TASK; options as for `merge`. Raises as `merge` does.

    `out` appears when all are there; after a kill the same command begins again.
    """
    refuse_taken(Path(out), "--out")
    names = [each.name for each in read_recipe(run).data.tasks]
    with staged_folder(Path(out)) as stage:
        exports = {name: merge(run, stage / name, task=name, **options) for name in names}
    return {name: replace(export, folder=Path(out) / name) for name, export in exports.items()}


def _check_placement(run: str | Path) -> None:
    row = find_method(read_recipe(run).adapter.method)
    if row.placement == "block":
        raise InputRefused(
            f"{row.name} stands beside a whole block: no weight can take its update; --to exact keeps it"
        )


__all__ = ["STRATEGIES", "Export", "Made", "constant_mixing", "make_static", "merge", "merge_tasks"]
