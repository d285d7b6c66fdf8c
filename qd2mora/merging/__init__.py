"""Merging: a run becomes plain weights, and a report of what they keep.

Static methods (LoRA, MoSLoRA) merge exactly; methods routed by task merge exactly for one task; methods routed by token
are replaced by the static updates of a strategy, and the loss of fidelity is measured on held-out rows.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from qd2mora.data.chat import template_to_keep
from qd2mora.disk.durable import write_json
from qd2mora.disk.sealed import seal_whole_folder
from qd2mora.disk.staged import staged_folder
from qd2mora.errors import InputRefused
from qd2mora.merging.as_written import Witness, witness_of
from qd2mora.merging.fidelity import Fidelity
from qd2mora.merging.measured_updates import (
    MeasuredUpdates,
    constant_mixing,
    make_static,
    measure_routed,
    task_number,
)
from qd2mora.merging.rung import ExportForm, Written
from qd2mora.merging.rungs import export_form, open_weights
from qd2mora.merging.sample import batches_of, sample_rows
from qd2mora.merging.strategies import STRATEGIES, find_strategy
from qd2mora.mixture import MixtureConfig
from qd2mora.mixture.presets import find_method
from qd2mora.run_folder import OpenRun, open_run, read_recipe
from qd2mora.safekeeping.places import taken

DEFAULT = "auto"


@dataclass(frozen=True)
class ExportOptions:
    """Of what an export is made, and as what it is written."""

    strategy: str = DEFAULT
    task: str | None = None
    """Export for this task alone: calibration and measuring use its rows; needed where the method routes by task."""
    vector: list[float] | None = None
    """Export for rows that bring this vector, where the method reads one."""
    to: str = "hf"
    """The rung of the ladder, see `rungs`: `hf` plain weights, `lora` a PEFT LoRA, `exact` the routed model itself."""
    base: str = "dequantized"
    """The weights that training saw, or the original ones."""
    dtype: str | None = None
    """Of the weights, one of the rung's; its first where None."""
    max_shard: str | None = None
    with_vocabulary: bool = True
    allow_changed: Collection[str] = ()
    """Fields of the run's identity that may have changed since, `base` among them."""
    measured_rows: int | None = None
    """Of those held out, to measure the export on, 512 where None; 0: it is not measured, and says so."""
    keeps: bool = True
    """Take what an earlier merge made of the same from the run's `static/`, and keep it there."""


@dataclass(frozen=True)
class Export:
    """What a merge made, and how near it is to the routed model."""

    folder: Path
    updates: MeasuredUpdates
    written: Written
    form: ExportForm
    as_written: Fidelity | None = None
    """What the file itself keeps, read back, where its rounding is too much to be left out."""

    @property
    def strategy(self) -> str:
        return self.updates.strategy

    @property
    def exact(self) -> bool:
        return self.updates.exact

    @property
    def unexplained(self) -> dict[str, float]:
        return self.updates.unexplained

    @property
    def fidelity(self) -> Fidelity | None:
        """How near the export is on the base that it was written on."""
        return self.as_written or self.updates.bases.get(self.form.base)

    def to_json(self) -> dict[str, object]:
        """Return the content of `export_report.json`."""
        kept: dict[str, object] = {"loss": None, "gain_kept": None, "kl_per_token": None, "held_out_tokens": 0}
        if self.fidelity is not None:
            kept = self.fidelity.to_json()
        # What few bits take is in the file's own numbers, and not known of each linear.
        exact = None if self.form.is_measured_as_written else 0.0
        return {
            "to": self.form.to,
            "base": self.form.base,
            "dtype": self.form.dtype,
            "measured": self._measured,
            "strategy": self.strategy,
            "exact": self.exact,
            "task": self.updates.task,
            **kept,
            "bases": {name: each.to_json() for name, each in self.updates.bases.items()},
            "calibration_rows": self.updates.calibration_rows,
            "notes": self.updates.notes,
            "seconds": self.updates.seconds,
            "modules": {
                name: {"unexplained": self.unexplained.get(name), "rounding": self.written.rounding.get(name, exact)}
                for name in self.unexplained or self.written.rounding
            },
            "bytes": self.written.num_bytes,
            "kinds": self.written.kinds,
            "files": list(self.written.files),
        }

    @property
    def _measured(self) -> str:
        """Say of what the report tells."""
        if not self.updates.is_measured:
            return "not measured, as was asked"
        if self.form.dtype == "nf4" or self.as_written is not None:
            return "as written"
        return f"before rounding to {self.form.dtype}"


_PLAIN = ExportOptions()


def merge(run: str | Path, out: str | Path, options: ExportOptions = _PLAIN) -> Export:
    """Export a run as a folder `out`, with `export_report.json` and a sealed `manifest.json` in it.

    Raises InputRefused, also where the base is not the one trained on and `allow_changed` does not name it, and
    DamagedFile; `out` appears whole or not at all.
    """
    find_strategy(options.strategy)
    form = export_form(options.to, options.base, options.dtype, options.max_shard, options.with_vocabulary)
    # All that can be refused is refused before the base is loaded, which takes minutes for a 7B.
    _refuse_unfit(run, form, options.strategy)
    with taken(Path(out), "--out") as target:
        return replace(_exported(run, target, form, options), folder=Path(out))


def _exported(run: str | Path, target: Path, form: ExportForm, options: ExportOptions) -> Export:
    """Make the export in a place that is taken."""
    opened = open_run(run, allow_changed=options.allow_changed)
    # Whoever loads the export words a conversation as the run was trained.
    opened.tokenizer.chat_template = template_to_keep(opened.recipe.data) or opened.tokenizer.chat_template
    weights = open_weights(opened, form)
    if form.is_routed:
        updates = measure_routed(opened, options.task, options.vector, measured_rows=options.measured_rows)
    else:
        asked = (options.strategy, options.task, options.vector)
        updates = make_static(opened, *asked, measured_rows=options.measured_rows, keeps=options.keeps)
    # What the writing needs is copied out of the model, so that this can go before the base's weights come in one by
    # one.
    write = form.rung.prepare(opened, weights, updates.statics, form)
    witness = _witness(opened, updates, form, options)
    del opened  # the writing needs one weight at a time
    with staged_folder(target) as stage:
        export = Export(target, updates, write(stage), form)
        if witness is not None:
            export = replace(export, as_written=witness.compared_with(stage / next(iter(export.written.files))))
        write_json(stage / "export_report.json", export.to_json())
        # The large files' hashes are known from their writing: they are not read again.
        seal_whole_folder(stage, export.written.files, {"kind": "export", "base": weights.base.model_dump()})
    return export


def _witness(opened: OpenRun, updates: MeasuredUpdates, form: ExportForm, options: ExportOptions) -> Witness | None:
    """Ask the routed model about held-out rows, where the file will be measured as it is written."""
    before = updates.bases.get(form.base)
    if before is None or not form.is_measured_as_written:
        return None
    number = task_number(opened, options.task)
    rows = sample_rows(opened, number, measured_rows=options.measured_rows).held_out
    return witness_of(opened, batches_of(opened, rows, options.vector), before)


def merge_tasks(run: str | Path, out: str | Path, options: ExportOptions = _PLAIN) -> dict[str, Export]:
    """Export a run once for each of its tasks, into `out`/TASK. Raises as `merge` does.

    `out` appears when all are there; after a kill the same command begins again.
    """
    names = [each.name for each in read_recipe(run).data.tasks]
    with taken(Path(out), "--out") as target, staged_folder(target) as stage:
        exports = {name: merge(run, stage / name, replace(options, task=name)) for name in names}
    return {name: replace(export, folder=Path(out) / name) for name, export in exports.items()}


def _refuse_unfit(run: str | Path, form: ExportForm, strategy: str) -> None:
    """Refuse what a run, a method or a rung cannot do, before anything is loaded. Raises InputRefused."""
    if read_recipe(run).objective.kind == "reward":
        raise InputRefused(
            f"'{run}' scores answers, and an export has no place for the head; ask it with qd2mora reward"
        )
    recipe = read_recipe(run)
    config = MixtureConfig.from_recipe(recipe.adapter, len(recipe.data.tasks))
    if config.experts is not None:
        raise InputRefused(
            f"'{run}' has DoRA experts, which scale the base's own output by token: no weight and no code file of an "
            "export does; ask the run itself"
        )
    if config.routers.reads_spans:
        raise InputRefused(
            f"'{run}' acts in marked spans alone, which an export, static or exact, is not told; ask the run itself: "
            "qd2mora generate RUN --span"
        )
    if form.is_routed:
        if strategy != DEFAULT:
            raise InputRefused(f"--strategy: --to {form.to} keeps the routing, nothing is made static; leave it out")
        return
    row = find_method(read_recipe(run).adapter.method)
    if row.placement == "block":
        raise InputRefused(
            f"{row.name} stands beside a whole block: no weight can take its update; --to exact keeps it"
        )


__all__ = [
    "STRATEGIES",
    "Export",
    "ExportOptions",
    "MeasuredUpdates",
    "constant_mixing",
    "make_static",
    "merge",
    "merge_tasks",
]
