"""The app that verbs join, and the arguments that several of them take."""

from pathlib import Path
from typing import Annotated

import typer

from qd2mora import __version__
from qd2mora.errors import InputRefused

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
AllowChanged = Annotated[
    list[str] | None,
    typer.Option("--allow-changed", help="Go on though this field is not as it was.", metavar="FIELD"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RunPath = Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN", show_default=False)]

MOST = 1_000_000_000
"""Most that any count of the command line may be: beyond it lie Python's and torch's own limits."""


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


def words(text: str | None) -> tuple[str, ...]:
    """Return what an option lists with commas."""
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def numbers(text: str | None) -> list[float] | None:
    """Read the numbers of --vector, None where it was left out. Raises InputRefused."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputRefused(f"--vector: '{text}' will not do: numbers with commas, for example 0.1,-2,0.5") from None


def text_of(words: str, where: str) -> str:
    """Return what is text. Raises InputRefused where it holds bytes that are none."""
    try:
        words.encode()
    except UnicodeEncodeError as error:
        byte = f"byte 0x{ord(words[error.start]) & 0xFF:02x}"
        raise InputRefused(f"{where}: {byte} at character {error.start + 1} is no text; give it as UTF-8") from None
    return words


__all__ = [
    "MOST",
    "AllowChanged",
    "AsJson",
    "ModelPath",
    "Overrides",
    "RecipePath",
    "RunPath",
    "app",
    "numbers",
    "text_of",
    "words",
]
