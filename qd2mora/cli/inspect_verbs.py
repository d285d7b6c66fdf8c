"""The verb that looks at a run: inspect."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qd2mora.cli.app import AllowChanged, RunPath, app


@app.command()
def inspect(
    run: RunPath,
    html: Annotated[Path | None, typer.Option(help="Write the page here instead of into the run folder.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw curves and routing into this PNG (needs matplotlib).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the routing report as JSON; no page.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure routing anew, though routing.json is there.")] = False,
    rows: Annotated[int, typer.Option(help="Rows of each task to measure it on.", min=1)] = 256,
    allow_changed: AllowChanged = None,
) -> None:
    """Show routing by task, experts' likeness and curves: a summary here, all of it in one HTML file."""
    from qd2mora.report import draw_run, look_at, show_inspection, write_page

    files = look_at(run, again=again, rows=rows, allow_changed=allow_changed or ())
    if as_json:
        typer.echo(json.dumps(files.routing, indent=1))
    else:
        show_inspection(files, write_page(files, html), Console())
    if png is not None:
        draw_run(files, png)


__all__ = ["inspect"]
