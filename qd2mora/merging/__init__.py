"""Merging: a run becomes plain weights, and a report of what they keep.

Static methods (LoRA, MoSLoRA) merge exactly; methods routed by task merge exactly for one task; methods routed by token
are replaced by the static updates of a strategy, and the loss of fidelity is measured on held-out rows.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from qd2mora.errors import InputRefused
from qd2mora.merging.fidelity import Fidelity, measure, missed
from qd2mora.merging.rungs import Form, form_of, open_source, prepare_rung, seal
from qd2mora.merging.sample import Sample, batches_of, sample_rows
from qd2mora.merging.setting import Setting
from qd2mora.merging.static import Statics, of_cores
from qd2mora.merging.strategies import STRATEGIES, find_strategy
from qd2mora.merging.writer import Written
from qd2mora.mixture import mixture_layers, read_rows
from qd2mora.mixture.method import TASK, TOKEN
from qd2mora.mixture.presets import find_method
from qd2mora.run_folder import OpenRun, open_run, read_recipe, refuse_taken, staged_folder, write_json


@dataclass(frozen=True)
class Export:
    """What a merge made, and how near it is to the routed model."""

    folder: Path
    strategy: str
    exact: bool
    fidelity: Fidelity | None
    unexplained: dict[str, float]
    written: Written
    calibration_rows: int
    form: Form

    def to_json(self) -> dict[str, Any]:
        """Return the content of `export_report.json`."""
        unmeasured = {"loss": None, "gain_kept": None, "kl_per_token": None, "held_out_tokens": 0}
        return {
            "to": self.form.to,
            "base": self.form.base,
            "dtype": self.form.dtype,
            "strategy": self.strategy,
            "exact": self.exact,
            **(self.fidelity.to_json() if self.fidelity else unmeasured),
            "calibration_rows": self.calibration_rows,
            "modules": {
                name: {"unexplained": share, "rounding": self.written.rounding.get(name, 0.0)}
                for name, share in self.unexplained.items()
            },
            "bytes": self.written.num_bytes,
            "files": [file.name for file in self.written.files],
        }


@dataclass(frozen=True)
class Made:
    """The static updates of a run, before anything is written: what every writer starts from."""

    strategy: str
    exact: bool
    statics: Statics
    fidelity: Fidelity | None
    unexplained: dict[str, float]
    calibration_rows: int


def merge(
    run: str | Path,
    out: str | Path,
    *,
    strategy: str = "core_lsq",
    task: str | None = None,
    vector: list[float] | None = None,
    to: str = "hf",
    base: str = "dequantized",
    dtype: str | None = None,
    max_shard: str = "5GB",
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
    form = form_of(to, base, dtype, max_shard)
    refuse_taken(Path(out), "--out")
    if not form.is_routed:
        _check_placement(run)
    opened = open_run(run, allow_changed=allow_changed)
    source = open_source(opened, form)
    made = measure_routed(opened, task, vector) if form.is_routed else make_static(opened, strategy, task, vector)
    write = prepare_rung(opened, source, made.statics, form)
    del opened  # the writing needs one weight at a time
    with staged_folder(Path(out)) as stage:
        written = write(stage)
        export = Export(
            Path(out), made.strategy, made.exact, made.fidelity, made.unexplained, written, made.calibration_rows, form
        )
        write_json(stage / "export_report.json", export.to_json())
        seal(stage, written, source.base)
    return export


def measure_routed(opened: OpenRun, task: str | None = None, vector: list[float] | None = None) -> Made:
    """Measure the routed adapter as it is; it is told the task, where its routers read one beside the token."""
    number = _task_number(opened, task)
    _check_vector(opened, vector)
    held_out = batches_of(opened, sample_rows(opened, number).held_out, vector)
    fidelity = measure(opened.model, {}, held_out) if held_out else None
    if number is not None:
        read_rows(opened.model, {"task_index": torch.tensor([number], device=opened.model.device)})
    return Made("routed", True, {}, fidelity, {}, 0)


def make_static(opened: OpenRun, strategy: str, task: str | None = None, vector: list[float] | None = None) -> Made:
    """Make and measure the static updates of an open run; writes nothing. Raises InputRefused."""
    number = _task_number(opened, task)
    _check_vector(opened, vector)
    rows = sample_rows(opened, number)
    is_exact = opened.depends_on != TOKEN
    if is_exact:
        statics = of_cores(opened.model, constant_mixing(opened.model, number or 0, vector))
    else:
        statics = find_strategy(strategy)(_setting(opened, rows))
    held_out = batches_of(opened, rows.held_out, vector)
    tested = held_out or batches_of(opened, rows.calibration, vector)
    names = [each.name for each in opened.recipe.data.tasks] if task is None else []
    return Made(
        strategy="exact" if is_exact else strategy,
        exact=is_exact,
        statics=statics,
        fidelity=measure(opened.model, statics, held_out, names) if held_out else None,
        unexplained=missed(opened.model, statics, tested),
        calibration_rows=0 if is_exact else len(rows.calibration),
    )


def _setting(opened: OpenRun, rows: Sample) -> Setting:
    calibration, checking = batches_of(opened, rows.calibration), batches_of(opened, rows.checking)
    return Setting(opened.model, calibration, checking, rows.trained_rows, opened.recipe.train.seed)


def constant_mixing(
    model: PeftModel, task: int, vector: list[float] | None = None, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """Return the K of every linear, float64, where it depends on no token; `task`, `vector`: those exported for."""
    routing: Any = model.base_model
    mixing = {}
    for name, layer in mixture_layers(model).items():
        device = layer.tensors(adapter_name)["mixture_A"].device
        routing.routing.task_index = torch.tensor([task], device=device)
        routing.routing.external = None if vector is None else torch.tensor([vector], device=device)
        with torch.no_grad():
            x = torch.zeros(1, 1, layer.in_features, device=device)
            mixing[name] = layer.mixing(x, adapter_name)[0, 0].double().cpu()
    return mixing


def _check_placement(run: str | Path) -> None:
    row = find_method(read_recipe(run).adapter.method)
    if row.placement == "block":
        raise InputRefused(f"{row.name} stands beside a whole block: no weight can take its update; serve the adapter")


def _task_number(opened: OpenRun, task: str | None) -> int | None:
    names = [each.name for each in opened.recipe.data.tasks]
    if task is not None and task not in names:
        raise InputRefused(f"--task: no task '{task}' in this run; there are {', '.join(names)}")
    if task is None and opened.depends_on == TASK and opened.reads_task and len(names) > 1:
        method = opened.recipe.adapter.method
        raise InputRefused(
            f"--task: {method} routes by task, one export serves one task; name one of {', '.join(names)}"
        )
    return None if task is None else names.index(task)


def _check_vector(opened: OpenRun, vector: list[float] | None) -> None:
    width, method = opened.vector_width, opened.recipe.adapter.method
    given = None if vector is None else len(vector)
    if given != width:
        wanted = "reads no vector" if width is None else f"reads a vector of {width} numbers"
        raise InputRefused(f"--vector: {method} {wanted}, {given or 'none'} given; one export serves one vector")


__all__ = ["STRATEGIES", "Export", "Made", "constant_mixing", "make_static", "merge"]
