"""Verbs on a run or a model: merge, eval, generate."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qd2mora.cli.app import AllowChanged, ModelPath, RunPath, app, numbers


@app.command()
def merge(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="New folder for the export.", show_default=False)],
    strategy: Annotated[str, typer.Option(help="From routed to static: core_lsq or mean_gate.")] = "core_lsq",
    task: Annotated[str | None, typer.Option(help="Export for this task alone.")] = None,
    vector: Annotated[str | None, typer.Option(help="Export for rows with this vector: numbers with commas.")] = None,
    allow_changed: AllowChanged = None,
) -> None:
    """Export ordinary fp16 weights, with a report of what the export keeps."""
    from qd2mora.merging import merge as run_merge
    from qd2mora.report import show_export

    row, allowed = None if vector is None else numbers(vector), allow_changed or ()
    done = run_merge(run, out, strategy=strategy, task=task, vector=row, allow_changed=allowed)
    show_export(done, out, Console())


@app.command(name="eval")
def evaluate(
    model: ModelPath,
    recipe: Annotated[Path | None, typer.Option(help="Recipe whose held-out rows are asked.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows of each task.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    allow_changed: AllowChanged = None,
) -> None:
    """Score held-out rows per task: exact match of greedy answers, and loss."""
    from qd2mora.evaluation import evaluate as run_evaluation
    from qd2mora.report import show_scores

    scores = run_evaluation(model, recipe=recipe, limit=limit, allow_changed=allow_changed or ())
    if as_json:
        typer.echo(json.dumps({name: score.to_json() for name, score in scores.items()}, indent=1))
    else:
        show_scores({str(model): scores}, Console())


@app.command()
def generate(
    model: ModelPath,
    prompt: Annotated[str, typer.Option(help="Instruction to follow; - reads standard input.", show_default=False)],
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text without the instruction template.")] = False,
    task: Annotated[str | None, typer.Option(help="Task, where the adapter routes by task.")] = None,
    vector: Annotated[str | None, typer.Option(help="Numbers with commas, where the adapter reads a vector.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.", min=1)] = 128,
    allow_changed: AllowChanged = None,
) -> None:
    """Write the answer to a prompt, routed adapter included."""
    from qd2mora.evaluation import generate as run_generation

    text = sys.stdin.read() if prompt == "-" else prompt
    answer = run_generation(
        model,
        text,
        raw=raw,
        task=task,
        vector=None if vector is None else numbers(vector),
        max_new_tokens=max_new_tokens,
        allow_changed=allow_changed or (),
    )
    typer.echo(answer)


__all__ = ["evaluate", "generate", "merge"]
