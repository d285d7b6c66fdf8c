"""From an open run to static updates and what they keep; nothing is written here."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from qd2mora.base.passes import device_of
from qd2mora.data import Row
from qd2mora.errors import InputRefused
from qd2mora.memory.checkpointing import decoder_layers
from qd2mora.merging.fidelity import Fidelity, measure, missed
from qd2mora.merging.kept_updates import Measured, Shelf, Solution
from qd2mora.merging.original_base import on_original, why_not_original
from qd2mora.merging.sample import ROWS_AT_ONCE, PaddedBatches, Sample, batches_of, sample_rows, shuffled_batches
from qd2mora.merging.static_updates import Statics, of_cores
from qd2mora.merging.strategies import find_strategy
from qd2mora.merging.strategy_inputs import StrategyInputs
from qd2mora.mixture import mixture_layers, read_rows
from qd2mora.routed.gate import TASK, TOKEN
from qd2mora.run_folder import OpenRun


@dataclass(frozen=True)
class MeasuredUpdates:
    """The static updates of a run, before anything is written: what every writer starts from.

    bases: fidelity by the base that the updates are added to, `dequantized` and, where it is at hand, `original`; empty
    without held-out rows. notes: what the strategy did. seconds: `making`, `measuring`.
    """

    strategy: str
    exact: bool
    statics: Statics
    bases: dict[str, Fidelity]
    unexplained: dict[str, float]
    calibration_rows: int
    task: str | None = None
    notes: dict[str, object] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    is_measured: bool = True
    """Whether anybody wanted it measured."""


def make_static(
    opened: OpenRun,
    strategy: str,
    task: str | None = None,
    vector: list[float] | None = None,
    *,
    measured_rows: int | None = None,
    keeps: bool = False,
) -> MeasuredUpdates:
    """Make and measure the static updates of an open run. Raises InputRefused.

    `measured_rows`: of those held out, HELD_OUT_ROWS where None; 0: nothing is measured. `keeps`: take what an earlier
    call made of the same from the run's folder, and keep it there.
    """
    number = task_number(opened, task)
    _check_vector(opened, vector)
    row, is_exact = find_strategy(strategy), opened.routers.depends_on != TOKEN
    if row.one_task and task is None and not is_exact:
        raise InputRefused(f"--strategy: {strategy} goes with --task NAME, or --task all for an export of each")
    rows, began = sample_rows(opened, number, row.share, measured_rows), time.monotonic()
    question = _Question(opened, "exact" if is_exact else strategy, task, vector, rows)
    shelf = question.shelf(keeps)
    solution = shelf.solution(device_of(opened.model)) or question.answered(number, is_exact, shelf)
    made = time.monotonic()
    measured = Measured({}, {}, {}) if measured_rows == 0 else question.measured(solution, shelf)
    return MeasuredUpdates(
        strategy=solution.strategy,
        exact=is_exact,
        statics=solution.statics,
        bases=measured.bases,
        unexplained=measured.unexplained,
        calibration_rows=solution.calibration_rows,
        task=task,
        notes=solution.notes | measured.notes,
        seconds={"making": made - began, "measuring": time.monotonic() - made},
        is_measured=measured_rows != 0,
    )


@dataclass(frozen=True)
class _Question:
    """Which static updates of a run are wanted, and the rows to make and to measure them."""

    opened: OpenRun
    strategy: str
    task: str | None
    vector: list[float] | None
    rows: Sample

    def shelf(self, keeps: bool) -> Shelf:
        """Return where they are kept. What is exact is quickly made, and depends on no rows."""
        settings: dict[str, object] = {"strategy": self.strategy, "task": self.task, "vector": self.vector}
        rows: list[Row] = []
        if self.strategy != "exact":
            rows = [*self.rows.calibration, *self.rows.checking, *self.rows.training]
            settings |= {"trained_rows": self.rows.trained_rows, "as_trained": list(_as_trained(self.opened))}
            settings["optimizer"] = self.opened.recipe.train.optimizer
        return Shelf.of(self.opened, settings, rows, keeps=keeps)

    def answered(self, number: int | None, is_exact: bool, shelf: Shelf) -> Solution:
        """Solve it, and keep what took work: a method that depends on no token is its own solution."""
        if is_exact:
            cores = constant_mixing(self.opened.model, number or 0, self.vector)
            return Solution("exact", of_cores(self.opened.model, cores), 0)
        solution = self._solved()
        shelf.keep(solution)
        return solution

    def _solved(self) -> Solution:
        inputs = strategy_inputs_of(self.opened, self.rows, self.vector)
        statics = find_strategy(self.strategy).make(inputs)
        return Solution(self.strategy, statics, len(self.rows.calibration), inputs.notes)

    def measured(self, solution: Solution, shelf: Shelf) -> Measured:
        """Measure, or take what was measured of the same."""
        place = shelf.measured_on(self.rows.held_out or self.rows.calibration, why_not_original(self.opened))
        kept = place.measured()
        if kept is not None:
            return kept
        held_out, notes = batches_of(self.opened, self.rows.held_out, self.vector), dict[str, object]()
        bases = _fidelity_by_base(self.opened, solution.statics, held_out, notes)
        of_linears = held_out or batches_of(self.opened, self.rows.calibration, self.vector)
        found = Measured(bases, missed(self.opened.model, solution.statics, of_linears), notes)
        place.keep_measured(found)
        return found


def _fidelity_by_base(
    opened: OpenRun, statics: Statics, held_out: PaddedBatches, notes: dict[str, object]
) -> dict[str, Fidelity]:
    """Measure static updates on the weights trained on, and on the original ones where they are at hand."""
    if not held_out:
        return {}
    names = [each.name for each in opened.recipe.data.tasks]
    bases = {"dequantized": measure(opened.model, statics, held_out, names)}
    with on_original(opened, notes) as original:
        if original is not None:
            bases["original"] = measure(opened.model, statics, held_out, names, merged_on=original)
    return bases


def measure_routed(
    opened: OpenRun, task: str | None = None, vector: list[float] | None = None, *, measured_rows: int | None = None
) -> MeasuredUpdates:
    """Measure the routed adapter as it is; it is told the task, where its routers read one beside the token."""
    number = task_number(opened, task, is_routed=True)
    _check_vector(opened, vector)
    held_out = batches_of(opened, sample_rows(opened, number, measured_rows=measured_rows).held_out, vector)
    bases = {}
    if held_out:
        bases["dequantized"] = measure(opened.model, {}, held_out)
    if number is not None:
        # Told last, and so what an exact export holds scores for (`exact.routed_parts`).
        read_rows(opened.model, {"task_index": torch.tensor([number], device=device_of(opened.model))})
    return MeasuredUpdates("routed", True, {}, bases, {}, 0, task, is_measured=measured_rows != 0)


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
            # K depends on no token here, so that any x shows it.
            x = torch.zeros(1, 1, layer.in_features, device=device)
            mixing[name] = layer.mixing(x, adapter_name)[0, 0].double().cpu()
    return mixing


def strategy_inputs_of(opened: OpenRun, rows: Sample, vector: list[float] | None) -> StrategyInputs:
    """Return what strategies work with, for rows of one run."""
    train = opened.recipe.train
    micro_batch, recomputed = _as_trained(opened)
    return StrategyInputs(
        model=opened.model,
        calibration=batches_of(opened, rows.calibration, vector),
        checking=batches_of(opened, rows.checking, vector),
        training=shuffled_batches(opened, rows.training, min(micro_batch, ROWS_AT_ONCE), vector),
        trained_rows=rows.trained_rows,
        recomputed=recomputed,
        eight_bit="8bit" in train.optimizer,
    )


def _as_trained(opened: OpenRun) -> tuple[int, int]:
    """Return the micro batch of the training, and the layers that it recomputed: what its memory was planned for.

    From the run's manifest; a run without one is taken for the smallest.
    """
    # An export should fit where the training did: it takes the training's micro batch and recomputing.
    every = len(decoder_layers(opened.model.get_base_model()))
    if not opened.folder.manifest.is_file():
        return 1, every
    choices = json.loads(opened.folder.manifest.read_text(encoding="utf-8"))["plan"]["choices"]
    recomputed = choices["memory.checkpointing"]["value"]
    # A number where the plan recomputes the first layers alone (`memory/reasons.py`).
    number = {"off": 0, "on": every}.get(recomputed, recomputed)
    return int(choices["train.micro_batch"]["value"]), int(number)


def task_number(opened: OpenRun, task: str | None, *, is_routed: bool = False) -> int | None:
    """Return the task's number; a routed export, too, holds one task where its routers read it beside the token."""
    names = [each.name for each in opened.recipe.data.tasks]
    if task is not None and task not in names:
        raise InputRefused(f"--task: no task '{task}' in this run; there are {', '.join(names)}")
    routers = opened.routers
    if task is None and (is_routed or routers.depends_on == TASK) and routers.reads_task and len(names) > 1:
        method = opened.recipe.adapter.method
        raise InputRefused(
            f"--task: {method} routes by task, one export serves one task; name one of {', '.join(names)}"
        )
    return None if task is None else names.index(task)


def _check_vector(opened: OpenRun, vector: list[float] | None) -> None:
    """Refuse a vector that the method's routers do not read, or one of another width. Raises InputRefused."""
    width, method, given = opened.vector_width, opened.recipe.adapter.method, len(vector or ())
    if given == (width or 0):
        return
    wanted = f"reads a vector of {width} numbers"
    if width is None:
        wanted = "reads no vector"
    raise InputRefused(f"--vector: {method} {wanted}, {given or 'none'} given; one export serves one vector")


__all__ = ["MeasuredUpdates", "constant_mixing", "make_static", "measure_routed", "strategy_inputs_of", "task_number"]
