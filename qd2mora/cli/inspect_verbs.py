"""The verb that looks at a run: inspect."""

import json
from pathlib import Path
from typing import Annotated

import typer

from qd2mora.cli.app import MOST, AllowChanged, RunPath, app
from qd2mora.terminal import Screen


@app.command()
def inspect(
    run: RunPath,
    html: Annotated[Path | None, typer.Option(help="Write the page here instead of into the run folder.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw curves and routing into this PNG (the extra figures).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the routing report as JSON; no page.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure routing anew, though routing.json is there.")] = False,
    rows: Annotated[int, typer.Option(help="Rows of each task to measure it on.", min=1, max=MOST)] = 256,
    allow_changed: AllowChanged = None,
) -> None:
    """Show routing by task, experts' likeness and curves: a summary here, all of it in one HTML file."""
    from qd2mora.inspection import inspect_where_due
    from qd2mora.report import check_page, check_png, draw_run, read_run, show_inspection, write_page

    if html is not None:
        check_page(html)
    if png is not None:
        check_png(png)
    inspect_where_due(run, again=again, rows=rows, allow_changed=allow_changed or ())
    found = read_run(run)
    if not as_json:
        show_inspection(found, write_page(found, html), Screen())
    elif found.routing is None:
        typer.echo("null")
    else:
        typer.echo(json.dumps(found.routing.to_json(), indent=1))
    if png is not None:
        draw_run(found, png)


__all__ = ["inspect"]
