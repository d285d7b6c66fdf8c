"""The verb that measures what a model costs to ask: bench."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from qd2mora.cli.app import AsJson, ModelPath, app
from qd2mora.cli.groups import grouped
from qd2mora.stopping import listening
from qd2mora.terminal import Screen


@dataclass(frozen=True)
class LoadOptions:
    """How much is asked."""

    requests: Annotated[int, typer.Option(help="Requests, one at a time.", min=1, max=100_000)] = 20
    rows_at_once: Annotated[int, typer.Option(help="Requests that are served together.", min=1, max=4096)] = 8
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1, max=1_000_000)] = 64
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=1, max=1_000_000)] = 32


@app.command()
@grouped
def bench(
    model: ModelPath,
    load: LoadOptions,
    with_plan: Annotated[bool, typer.Option("--plan", help="The planner's peak beside the run's own.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure latency, throughput, memory, compute use, energy and compression of a run, an export or a base."""
    from qd2mora.disk.durable import write_json
    from qd2mora.evaluation.efficiency import BenchOptions
    from qd2mora.evaluation.efficiency import bench as run_bench
    from qd2mora.report.efficiency import show_bench
    from qd2mora.safekeeping.places import check_file

    if out is not None:
        check_file(out, "--out", b'{\n "model"', "a measurement")
    options = BenchOptions(load.requests, load.rows_at_once, load.prompt_tokens, load.new_tokens)
    with listening("nothing is kept of a measurement, run the command again"):
        found = run_bench(model, options, with_plan=with_plan)
    if out is not None:
        write_json(out, found)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        show_bench(found, Screen())


__all__ = ["bench"]
