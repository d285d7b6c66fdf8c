"""The verb that publishes: push."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from qd2mora.cli.app import app
from qd2mora.cli.groups import grouped
from qd2mora.stopping import listening

Source = Annotated[Path, typer.Argument(help="Run or export.", metavar="RUN_OR_EXPORT", show_default=False)]
Name = Annotated[str, typer.Argument(help="Where to.", metavar="OWNER/NAME", show_default=False)]


@dataclass(frozen=True)
class PublishOptions:
    """What goes along, and how."""

    base: Annotated[
        str | None, typer.Option("--base", help="The base's name on the hub, where it is a folder here.")
    ] = None
    licence: Annotated[str | None, typer.Option("--license", help="Else the one that the base's own card names.")] = (
        None
    )
    run: Annotated[Path | None, typer.Option("--run", help="Run whose data and scores an export's card tells.")] = None
    private: Annotated[bool, typer.Option("--private", help="Nobody else sees it.")] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write what would go to a folder, and push nothing.")] = (
        False
    )
    out: Annotated[Path | None, typer.Option(help="Where it is put together; beside it where left out.")] = None


@app.command()
@grouped
def push(source: Source, name: Name, publish: PublishOptions) -> None:
    """Push a run or an export to the hub, with a card made of its own report; hashes are compared before."""
    from qd2mora.publishing import PushOptions
    from qd2mora.publishing import push as run_push

    with listening():
        pushed = run_push(source, name, PushOptions(**asdict(publish)), typer.echo)
    done = "would go, nothing was pushed" if publish.dry_run else "pushed"
    typer.echo(f"{len(pushed.files)} files, {pushed.num_bytes:,} bytes, {done}: {pushed.where}")


__all__ = ["push"]
