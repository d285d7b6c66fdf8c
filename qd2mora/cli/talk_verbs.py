"""Verbs that talk with a run, an export or a base: generate, chat."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from qd2mora.cli.app import MOST, AllowChanged, ModelPath, app, numbers, text_of
from qd2mora.cli.groups import grouped
from qd2mora.cli.ways import Extract, GatesEvery, Samples, WayOptions
from qd2mora.errors import InputRefused
from qd2mora.stopping import listening

Task = Annotated[str | None, typer.Option(help="Task: words as it was trained, routes by it where the adapter does.")]
Vector = Annotated[str | None, typer.Option(help="Numbers with commas, where the adapter reads a vector.")]
KEPT = "what is answered is kept, and the same command goes on from there"


@dataclass(frozen=True)
class PromptOptions:
    """What is to be answered: a prompt, or a file of them."""

    prompt: Annotated[
        str | None, typer.Option(help="Instruction to follow; - reads standard input.", show_default=False)
    ] = None
    file: Annotated[
        Path | None, typer.Option(help='Answer each row of it instead: JSON lines with "prompt" or "messages".')
    ] = None
    out: Annotated[Path | None, typer.Option(help="New file for the answers; the same command goes on.")] = None
    rows_at_once: Annotated[int, typer.Option(help="Rows of a batch; no answer depends on it.", min=1, max=MOST)] = 16
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text without any template.")] = False


@dataclass(frozen=True)
class RoutingOptions:
    """What routers are told of a prompt, and where adapters act in it."""

    task: Task = None
    vector: Vector = None
    span: Annotated[
        list[str] | None,
        typer.Option(
            help="ADAPTER=START:END, letters of the prompt in which it acts; START: or answer goes on after it."
        ),
    ] = None
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.", min=1, max=MOST)] = 128


@dataclass(frozen=True)
class WordingOptions:
    """How messages are worded and tokens are drawn."""

    template: Annotated[
        str | None,
        typer.Option(help="Wording: instruction, tokenizer (its chat template), chatml, plain; else as trained."),
    ] = None
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token, more draws.")] = 0.0
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens of this summed probability.")] = 1.0
    seed: Annotated[int, typer.Option(help="The same seed draws the same.", min=0, max=2**32 - 1)] = 0


@dataclass(frozen=True)
class DrawOptions:
    """How often an answer is drawn, and what of it counts."""

    samples: Samples = 1
    extract: Extract = None
    gates_every: GatesEvery = 1


@app.command()
@grouped
def generate(
    model: ModelPath,
    asked: PromptOptions,
    acting: RoutingOptions,
    manner: WordingOptions,
    beside: WayOptions,
    counted: DrawOptions,
    allow_changed: AllowChanged = None,
) -> None:
    """Write the answer to a prompt as it comes, or those to a file of prompts; routed adapter included."""
    _check_asked(asked, acting.span)
    from qd2mora.evaluation import ManyOptions, TalkOptions

    way = beside.way(seed=manner.seed, temperature=manner.temperature, **asdict(counted))
    told = TalkOptions(
        task=acting.task,
        vector=numbers(acting.vector),
        max_new_tokens=acting.max_new_tokens,
        spans=tuple(acting.span or ()),
        way=way,
        **asdict(manner),
    )
    if asked.file is not None and asked.out is not None:
        _answer_file(
            model, (asked.file, asked.out), ManyOptions(told, asked.raw, asked.rows_at_once), allow_changed or ()
        )
    elif asked.prompt is not None:
        _answer(model, asked.prompt, told, asked.raw, allow_changed or ())


def _check_asked(asked: PromptOptions, span: Sequence[str] | None) -> None:
    """Refuse what asks for nothing, or for two things. Raises InputRefused."""
    if (asked.prompt is None) == (asked.file is None):
        raise InputRefused("--prompt: name a prompt, or with --file and --out a file of them")
    if (asked.file is None) != (asked.out is None):
        raise InputRefused("--out: goes with --file, as --file does with it: prompts in one, answers in the other")
    if asked.file is not None and span:
        raise InputRefused("--span: marks letters of one --prompt; prompts of a file have none")


def _answer(model: Path, prompt: str, options: Any, raw: bool, allow_changed: Sequence[str]) -> None:
    from qd2mora.evaluation import generate as run_generation

    if prompt == "-":
        prompt = _read(sys.stdin.read)
    prompt = text_of(prompt, "--prompt")
    run_generation(model, prompt, options, raw=raw, write=_show, say=_say, allow_changed=allow_changed)
    typer.echo()


def _answer_file(model: Path, files: tuple[Path, Path], how: Any, allow_changed: Sequence[str]) -> None:
    """Answer the rows of the first file in the second."""
    from qd2mora.evaluation import generate_file

    with listening(KEPT):
        number = generate_file(model, *files, how, say=_say, allow_changed=allow_changed)
    typer.echo(f"{number} answers in {files[1]}")


@app.command()
@grouped
def chat(
    model: ModelPath,
    task: Task = None,
    vector: Vector = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.", min=1, max=MOST)] = 512,
    *,
    manner: WordingOptions,
    allow_changed: AllowChanged = None,
) -> None:
    """Talk, line by line from standard input; /new forgets what was said, the end of input ends it.

    Where no chat template words the conversation, each line is an instruction of its own, as in training.
    """
    from qd2mora.evaluation import TalkOptions
    from qd2mora.evaluation import chat as run_chat

    options = TalkOptions(task=task, vector=numbers(vector), max_new_tokens=max_new_tokens, **asdict(manner))
    run_chat(model, _lines(), _show, options, say=_say, allow_changed=allow_changed or ())


def _lines() -> Iterator[str]:
    """Yield the lines of standard input, asking for each where somebody sits there."""
    while True:
        if sys.stdin.isatty():
            typer.echo("> ", nl=False)
        line = _read(sys.stdin.readline)
        if not line:
            return
        yield line


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _read(read: Callable[[], str]) -> str:
    """Read from standard input. Raises InputRefused where it is no text."""
    try:
        return text_of(read(), "standard input")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputRefused(f"standard input: byte 0x{byte:02x} is no {error.encoding}; give text as UTF-8") from None


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


__all__ = ["chat", "generate"]
