"""Verbs on a run or a model: merge, verify."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from qd2mora.cli.app import AllowChanged, RunPath, app, numbers
from qd2mora.cli.groups import grouped
from qd2mora.disk.sealed import MANIFEST
from qd2mora.errors import InputRefused
from qd2mora.stopping import listening
from qd2mora.terminal import Screen


@dataclass(frozen=True)
class UpdateOptions:
    """Which static update stands for the routed one."""

    strategy: Annotated[
        str, typer.Option(help="From routed to static: auto, core_lsq, distill, mean_gate, per_task or sequential.")
    ] = "auto"
    task: Annotated[str | None, typer.Option(help="Export for this task alone; all: one export for each.")] = None
    vector: Annotated[str | None, typer.Option(help="Export for rows with this vector: numbers with commas.")] = None


@dataclass(frozen=True)
class FormOptions:
    """As what it is written."""

    to: Annotated[
        str, typer.Option(help="hf or gguf: weights; lora or gguf_lora: a LoRA; exact: the routed model.")
    ] = "hf"
    base: Annotated[str, typer.Option(help="Weights added to: dequantized (trained on) or original.")] = "dequantized"
    dtype: Annotated[
        str | None,
        typer.Option(
            help="hf: float16, bfloat16, float32; exact: these or nf4; LoRAs: float32, float16; gguf: float16, "
            "bfloat16, q8_0, q6_k, q5_k_m, q4_k_m, q4_0."
        ),
    ] = None
    max_shard: Annotated[
        str | None, typer.Option(help="hf and exact: size of one file of weights; 5GB where not given.")
    ] = None
    no_vocabulary: Annotated[
        bool, typer.Option("--no-vocabulary", help="GGUF for token ids alone, where llama.cpp lacks the tokenizer.")
    ] = False


@app.command()
@grouped
def merge(
    run: RunPath,
    out: Annotated[Path | None, typer.Option(help="New folder for the export.", show_default=False)] = None,
    *,
    update: UpdateOptions,
    form: FormOptions,
    measure: Annotated[
        str | None, typer.Option(help="Held-out rows to measure on, or none; 512 where left out.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say how long it may take, and make nothing.")] = False,
    allow_changed: AllowChanged = None,
) -> None:
    """Export ordinary weights, a LoRA or the routed model itself, with a report of what the export keeps."""
    if out is None and not plan:
        raise InputRefused("--out: name a new folder for the export")
    from qd2mora.merging import ExportOptions

    options = ExportOptions(
        strategy=update.strategy,
        task=update.task,
        vector=numbers(update.vector),
        to=form.to,
        base=form.base,
        dtype=form.dtype,
        max_shard=form.max_shard,
        with_vocabulary=not form.no_vocabulary,
        allow_changed=allow_changed or (),
        measured_rows=_rows_to_measure(measure),
    )
    if out is None or plan:
        _say_forecast(run, options)
    else:
        _merge(run, out, options)


def _say_forecast(run: Path, options: Any) -> None:
    from qd2mora.merging.forecast import forecast

    with listening():
        line = forecast(
            run, options.strategy, options.task, options.measured_rows, allow_changed=tuple(options.allow_changed)
        )
        Screen().print(line, soft_wrap=True, highlight=False)


def _merge(run: Path, out: Path, options: Any) -> None:
    from qd2mora.merging import merge as run_merge
    from qd2mora.merging import merge_tasks
    from qd2mora.report import show_export

    with listening("no half of the output is left, run the command again"):
        if options.task == "all":
            exports = list(merge_tasks(run, out, options).values())
        else:
            exports = [run_merge(run, out, options)]
    for export in exports:
        show_export(export, export.folder, Screen())


def _rows_to_measure(text: str | None) -> int | None:
    """Return how many rows --measure asks for, 0 for none. Raises InputRefused."""
    if text is None:
        return None
    if text == "none":
        return 0
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text, re.ASCII):
        raise InputRefused(f"--measure: '{text}' will not do: a number of held-out rows, or none")
    return int(text)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Run, adapter or export.", metavar="FOLDER", show_default=False)],
) -> None:
    """Read every file back and compare it with the hash it was written with: whole runs, adapters, exports."""
    from qd2mora.safekeeping.verification import verified

    num_found = 0
    for each in verified(folder):
        num_found += 1
        for line in each.said:
            typer.echo(f"{each.folder}: {line}")
        typer.echo(f"{each.folder}: whole, {each.num_bytes:,} bytes")
    if not num_found:
        raise InputRefused(f"'{folder}' holds no {MANIFEST} with hashes; name a run, an adapter or an export")


__all__ = ["merge", "verify"]
