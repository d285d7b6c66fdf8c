"""Merging: a run becomes plain float16 weights, and a report of what they keep.

Static methods (LoRA, MoSLoRA) merge exactly; methods routed by task merge exactly for one task; methods routed by token
are replaced by the best static K of a strategy, and the loss of fidelity is measured on held-out rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from qd2mora.base import dense_weight
from qd2mora.data import Row, collate, prepare
from qd2mora.errors import InputRefused, nearest
from qd2mora.merging import core_lsq, mean_gate
from qd2mora.merging.fidelity import Fidelity, measure, unexplained
from qd2mora.merging.statistics import Moments, collect
from qd2mora.merging.writer import Written, write_model
from qd2mora.mixture import MixtureLinear, mixture_layers
from qd2mora.mixture.method import TASK, TOKEN
from qd2mora.mixture.presets import find_method
from qd2mora.run_folder import OpenRun, open_run, read_recipe, refuse_taken, staged_folder, write_json

STRATEGIES: dict[str, Callable[[Moments], Tensor]] = {"core_lsq": core_lsq.mixing, "mean_gate": mean_gate.mixing}

CALIBRATION_ROWS = 512
HELD_OUT_ROWS = 512
ROWS_AT_ONCE = 8


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

    def to_json(self) -> dict[str, Any]:
        """Return the content of `export_report.json`."""
        fidelity = self.fidelity
        return {
            "strategy": self.strategy,
            "exact": self.exact,
            "loss": {key: getattr(fidelity, key) for key in ("base", "routed", "merged")} if fidelity else None,
            "gain_kept": fidelity.gain_kept if fidelity else None,
            "kl_per_token": fidelity.kl_per_token if fidelity else None,
            "held_out_tokens": fidelity.tokens if fidelity else 0,
            "calibration_rows": self.calibration_rows,
            "modules": {
                name: {"unexplained": share, "rounding": self.written.rounding.get(name, 0.0)}
                for name, share in self.unexplained.items()
            },
            "bytes": self.written.num_bytes,
            "files": self.written.files,
        }


def merge(
    run: str | Path,
    out: str | Path,
    *,
    strategy: str = "core_lsq",
    task: str | None = None,
    vector: list[float] | None = None,
) -> Export:
    """Export a run as a float16 Hugging Face folder `out`, with `export_report.json` in it.

    `task`: export for this task alone: calibration and measuring use its rows; needed where the method routes by task.
    `vector`: export for rows that bring this vector, where the method reads one.

    Raises InputRefused; `out` appears whole or not at all.
    """
    _check_strategy(strategy)
    refuse_taken(Path(out), "--out")
    _check_placement(run)
    opened = open_run(run)
    number = _task_number(opened, task)
    _check_vector(opened, vector)
    calibration, held_out = _sample_rows(opened, number)
    held_out_batches = _batches(opened, held_out, vector)
    tested = held_out_batches or _batches(opened, calibration, vector)
    if _depends_on(opened) == TOKEN:
        moments = collect(opened.model, _batches(opened, calibration))
        mixing = {name: STRATEGIES[strategy](each) for name, each in moments.items()}
    else:
        strategy, calibration = "exact", []
        mixing = constant_mixing(opened.model, number or 0, vector)
    with staged_folder(Path(out)) as stage:
        base: Any = opened.model.get_base_model()
        export = Export(
            folder=Path(out),
            strategy=strategy,
            exact=_depends_on(opened) != TOKEN,
            fidelity=measure(opened.model, mixing, held_out_batches) if held_out else None,
            unexplained=_unexplained(opened.model, mixing, tested),
            written=write_model(base, opened.tokenizer, _update(opened.model, mixing), stage),
            calibration_rows=len(calibration),
        )
        write_json(stage / "export_report.json", export.to_json())
    return export


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


def _check_strategy(strategy: str) -> None:
    if strategy not in STRATEGIES:
        raise InputRefused(f"--strategy: unknown strategy '{strategy}'; {nearest(strategy, STRATEGIES)}")


def _check_placement(run: str | Path) -> None:
    row = find_method(read_recipe(run).adapter.method)
    if row.placement == "block":
        raise InputRefused(f"{row.name} stands beside a whole block: no weight can take its update; serve the adapter")


def _depends_on(opened: OpenRun) -> str:
    return find_method(opened.recipe.adapter.method).depends_on


def _task_number(opened: OpenRun, task: str | None) -> int | None:
    names = [each.name for each in opened.recipe.data.tasks]
    if task is not None and task not in names:
        raise InputRefused(f"--task: no task '{task}' in this run; there are {', '.join(names)}")
    row = find_method(opened.recipe.adapter.method)
    if task is None and row.depends_on == TASK and row.reads_task and len(names) > 1:
        method = opened.recipe.adapter.method
        raise InputRefused(
            f"--task: {method} routes by task, one export serves one task; name one of {', '.join(names)}"
        )
    return None if task is None else names.index(task)


def _check_vector(opened: OpenRun, vector: list[float] | None) -> None:
    adapter = opened.recipe.adapter
    width = adapter.external_width if find_method(adapter.method).reads_vector else None
    given = None if vector is None else len(vector)
    if given != width:
        wanted = "reads no vector" if width is None else f"reads a vector of {width} numbers"
        raise InputRefused(
            f"--vector: {adapter.method} {wanted}, {given or 'none'} given; one export serves one vector"
        )


def _sample_rows(opened: OpenRun, number: int | None) -> tuple[list[Row], list[Row]]:
    """Return calibration rows from the training rows and all held-out rows, evenly over tasks, up to the limits."""
    tasks = prepare(opened.recipe.data, opened.tokenizer, opened.recipe.train.seed)
    chosen = tasks if number is None else [tasks[number]]
    generator = np.random.default_rng(opened.recipe.train.seed)

    def some(rows: list[Row], limit: int) -> list[Row]:
        return [rows[place] for place in sorted(generator.permutation(len(rows))[: limit // len(chosen)].tolist())]

    calibration = [row for task in chosen for row in some(task.train, CALIBRATION_ROWS)]
    return calibration, [row for task in chosen for row in some(task.validation, HELD_OUT_ROWS)]


def _batches(opened: OpenRun, rows: list[Row], vector: list[float] | None = None) -> list[dict[str, Tensor]]:
    pad = opened.tokenizer.pad_token_id
    by_length = sorted(rows, key=lambda row: len(row.ids))
    parts = [by_length[start : start + ROWS_AT_ONCE] for start in range(0, len(by_length), ROWS_AT_ONCE)]
    device = opened.model.device
    batches = [{name: tensor.to(device) for name, tensor in collate(part, pad).items()} for part in parts]
    if vector is not None:
        batches = [
            batch | {"external": torch.tensor([vector] * len(batch["labels"]), device=device)} for batch in batches
        ]
    return batches


def _unexplained(
    model: PeftModel, mixing: dict[str, Tensor], batches: list[dict[str, Tensor]], adapter_name: str = "default"
) -> dict[str, float]:
    """Measure each linear's share on held-out rows, in one pass."""
    layers = mixture_layers(model)
    return {
        name: unexplained(each, mixing[name], layers[name].columns(adapter_name).detach().cpu())
        for name, each in collect(model, batches).items()
    }


def _update(
    model: PeftModel, mixing: dict[str, Tensor], adapter_name: str = "default"
) -> Callable[[str], Tensor | None]:
    """Return a function from a linear's name to its update s B K A, (d_out, d_in) float32; None where there is none."""
    layers = mixture_layers(model)
    by_peft = {name.removeprefix("base_model.model."): each for name, each in model.named_modules() if _is_dora(each)}

    def update(name: str) -> Tensor | None:
        if name in by_peft:
            return dora_update(by_peft[name], adapter_name)
        if name not in layers:
            return None
        up = layers[name].columns(adapter_name).detach().float().cpu()
        down = layers[name].rows(adapter_name).detach().float().cpu()
        delta = layers[name].scaling(adapter_name) * (up @ (mixing[name].float() @ down))
        return delta + _base_change(layers[name], adapter_name)

    return update


def _base_change(layer: MixtureLinear, adapter_name: str) -> Tensor | float:
    """Return (a_0 - 1) W where a method scales its base, else 0."""
    scale = layer.tensors(adapter_name).get("mixture_base_scale")
    if scale is None:
        return 0.0
    linear: Any = layer.get_base_layer()
    return 0.2 * scale.detach().tanh().float().cpu() * dense_weight(linear).cpu()


def _is_dora(module: torch.nn.Module) -> bool:
    return isinstance(module, LoraLayer) and bool(module.use_dora)


def dora_update(layer: Any, adapter_name: str) -> Tensor:
    """Return m (W + s B A) / |W + s B A|_row - W of one of PEFT's DoRA linears, (d_out, d_in) float32."""
    weight = dense_weight(layer.get_base_layer()).cpu()
    down, up = (bank[adapter_name].weight.detach().float().cpu() for bank in (layer.lora_A, layer.lora_B))
    moved = weight + layer.scaling[adapter_name] * (up @ down)
    magnitude = layer.lora_magnitude_vector[adapter_name].weight.detach().float().cpu()
    return (magnitude / moved.norm(dim=1)).unsqueeze(1) * moved - weight


__all__ = ["STRATEGIES", "Export", "constant_mixing", "dora_update", "merge"]
