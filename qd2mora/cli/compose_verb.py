"""The verb that makes adapters out of adapters: compose."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from qd2mora.cli.app import MOST, app
from qd2mora.cli.groups import grouped

OPERATIONS = (
    "cat, linear, lego, average, sub, prune, fit-router, add-expert, drop-expert, pick-ranks, upcycle, extract or "
    "imagine."
)


@dataclass(frozen=True)
class OperationOptions:
    """What operations take beside their inputs."""

    weights: Annotated[str | None, typer.Option(help="One for each input, with commas; else all 1 / n.")] = None
    rank: Annotated[
        int | None,
        typer.Option(help="Rank of what comes out: lego, sub, extract; the most of pick-ranks.", min=1, max=MOST),
    ] = None
    experts: Annotated[
        int | None, typer.Option(help="Experts of what comes out: sub, prune, upcycle.", min=1, max=MOST)
    ] = None
    learn: Annotated[Path | None, typer.Option(help="Of cat: recipe or run on whose rows weights are learned.")] = None
    steps: Annotated[int | None, typer.Option(help="Of --learn; else 100.", min=0, max=MOST)] = None
    on: Annotated[
        Path | None,
        typer.Option(help="Recipe or run: rows to measure use on (sub, prune), to fit a router on, to imagine for."),
    ] = None
    router: Annotated[str | None, typer.Option(help="Of fit-router: lsq, or prototype, which grows.")] = None
    describe: Annotated[Path | None, typer.Option(help="Of fit-router: YAML, a text on each input.")] = None
    keep: Annotated[
        int | None, typer.Option(help="Of --describe: inputs to take, the nearest to the prompts.", min=1, max=MOST)
    ] = None
    expert: Annotated[str | None, typer.Option(help="Of drop-expert: numbers from 0, with commas.")] = None
    energy: Annotated[float | None, typer.Option(help="Of pick-ranks: share of an expert to keep, to 1.")] = None


@app.command()
@grouped
def compose(
    operation: Annotated[str, typer.Argument(help=OPERATIONS, show_default=False)],
    inputs: Annotated[
        list[str],
        typer.Argument(help="Adapters or runs; for extract a tuned model and its base.", metavar="INPUT..."),
    ],
    out: Annotated[Path, typer.Option(help="New folder for the adapter.", show_default=False)],
    how: OperationOptions,
) -> None:
    """Make one adapter of several, a smaller (sub, prune) or routed one (upcycle), or one of checkpoints (extract)."""
    from qd2mora.composition import ComposeOptions
    from qd2mora.composition import compose as run_composition

    done = run_composition(operation, inputs, out, ComposeOptions(**asdict(how)))
    typer.echo(f"{done.folder}: {done.words}")


__all__ = ["compose"]
