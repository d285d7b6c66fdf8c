"""The command line: one verb, one function; heavy imports stay inside the verb, so that --help is instant."""

import errno
import json
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer
from rich.console import Console
from typer.exceptions import TyperException

from qd2mora import __version__
from qd2mora.errors import DiskTrouble, InputRefused, StopError, nearest
from qd2mora.redact import redacted

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(help="Recipe file (YAML).", metavar="RECIPE", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides, for example train.steps=100.", metavar="[KEY=VALUE]...")
]
ModelPath = Annotated[Path, typer.Argument(help="Run or model folder.", metavar="RUN_OR_MODEL", show_default=False)]
RunPath = Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN", show_default=False)]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qd2mora {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version)] = False,
) -> None:
    """Fine-tune 4-bit LLaMA models for many tasks at once, with D2MoRA and other mixtures of LoRA.

    Errors are one line; --debug, anywhere, shows the traceback.
    """


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest whole checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
) -> None:
    """Plan, then train; write the run folder."""
    from qd2mora.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from qd2mora.report import finish
    from qd2mora.training import train as run_training

    trained = run_training(loaded, resume=resume, overwrite=overwrite)
    finish(trained.folder, Console())


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    budget: Annotated[str | None, typer.Option(help="Memory to fit, for example 8GiB.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a run will need, item by item, without reading weights."""
    from qd2mora.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from qd2mora.memory import plan as make_plan
    from qd2mora.memory import render

    planned = make_plan(loaded, budget=budget)
    if as_json:
        typer.echo(json.dumps(planned.to_json(), indent=1))
    else:
        Console().print(render(planned))
    if not planned.fits:
        raise typer.Exit(3)


@app.command()
def preview(
    recipe: RecipePath,
    overrides: Overrides = None,
    number: Annotated[int, typer.Option("-n", help="Rows of each task.", min=1)] = 3,
) -> None:
    """Show rows as the model sees them: what is given, what is learned, lengths, shares."""
    from qd2mora.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from qd2mora.report import show_rows

    show_rows(loaded, number, Console())


@app.command()
def merge(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="New folder for the export.", show_default=False)],
    strategy: Annotated[str, typer.Option(help="From routed to static: core_lsq or mean_gate.")] = "core_lsq",
    task: Annotated[str | None, typer.Option(help="Export for this task alone.")] = None,
    vector: Annotated[str | None, typer.Option(help="Export for rows with this vector: numbers with commas.")] = None,
) -> None:
    """Export ordinary fp16 weights, with a report of what the export keeps."""
    from qd2mora.merging import merge as run_merge
    from qd2mora.report import show_export

    numbers = None if vector is None else _numbers(vector)
    show_export(run_merge(run, out, strategy=strategy, task=task, vector=numbers), out, Console())


@app.command(name="eval")
def evaluate(
    model: ModelPath,
    recipe: Annotated[Path | None, typer.Option(help="Recipe whose held-out rows are asked.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows of each task.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score held-out rows per task: exact match of greedy answers, and loss."""
    from qd2mora.evaluation import evaluate as run_evaluation
    from qd2mora.report import show_scores

    scores = run_evaluation(model, recipe=recipe, limit=limit)
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
) -> None:
    """Write the answer to a prompt, routed adapter included."""
    from qd2mora.evaluation import generate as run_generation

    text = sys.stdin.read() if prompt == "-" else prompt
    numbers = None if vector is None else _numbers(vector)
    typer.echo(run_generation(model, text, raw=raw, task=task, vector=numbers, max_new_tokens=max_new_tokens))


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="One method in full.")] = None) -> None:
    """List the methods; with a name, its equation, defaults and source."""
    from qd2mora.report import show_methods

    show_methods(name, Console())


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None) -> None:
    """List the recipes that come along; with a name, print one: `qd2mora recipes quickstart > my.yaml`."""
    from qd2mora.recipe_file import shipped_recipes

    found = shipped_recipes()
    if name is None:
        for each, path in sorted(found.items()):
            typer.echo(f"{each:32} {path.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}")
        return
    if name not in found:
        raise InputRefused(f"no recipe '{name}'; {nearest(name, sorted(found))}")
    typer.echo(found[name].read_text(encoding="utf-8"), nl=False)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputRefused(f"--vector: '{text}' will not do: numbers with commas, for example 0.1,-2,0.5") from None


def main() -> None:
    """Run the command line; an error becomes one line and an exit code."""
    sys.excepthook = _show_traceback
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        code = app(arguments, standalone_mode=False)
    except (StopError, TyperException, OSError) as error:
        if len(arguments) < len(sys.argv[1:]):
            raise
        print(f"error: {redacted(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(_exit_code(error))
    except typer.Abort:
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _exit_code(error: StopError | TyperException | OSError) -> int:
    """A full or failing disk is told apart from a path that will not do."""
    if isinstance(error, OSError):
        disk = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
        return DiskTrouble.exit_code if error.errno in disk else InputRefused.exit_code
    return error.exit_code


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of --debug, or of a mistake of ours, without the secrets in it."""
    print(redacted("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


__all__ = ["app", "main"]
