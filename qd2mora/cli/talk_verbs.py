"""Verbs that talk with a run, an export or a base: generate, chat."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from qd2mora.cli.app import MOST, AllowChanged, ModelPath, app, numbers, text_of
from qd2mora.cli.ways import (
    Alpha,
    Beta,
    Calibrate,
    Extract,
    GatesEvery,
    Mix,
    Others,
    Samples,
    Triggers,
    WeakModel,
    asked_way,
)
from qd2mora.errors import InputRefused
from qd2mora.stopping import listening

Task = Annotated[str | None, typer.Option(help="Task: words as it was trained, routes by it where the adapter does.")]
Vector = Annotated[str | None, typer.Option(help="Numbers with commas, where the adapter reads a vector.")]
Spans = Annotated[
    list[str] | None,
    typer.Option(help="ADAPTER=START:END, letters of the prompt in which it acts; START: or answer goes on after it."),
]
Template = Annotated[
    str | None,
    typer.Option(help="Wording: instruction, tokenizer (its chat template), chatml, plain; else as trained."),
]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token, more draws.")]
TopP = Annotated[float, typer.Option(help="Draw among the likeliest tokens of this summed probability.")]
Seed = Annotated[int, typer.Option(help="The same seed draws the same.", min=0, max=2**32 - 1)]
PromptFile = Annotated[
    Path | None, typer.Option(help='Answer each row of it instead: JSON lines with "prompt" or "messages".')
]
AnswerFile = Annotated[Path | None, typer.Option(help="New file for the answers; the same command goes on.")]
RowsAtOnce = Annotated[int, typer.Option(help="Rows of a batch; no answer depends on it.", min=1, max=MOST)]
KEPT = "what is answered is kept, and the same command goes on from there"


@app.command()
def generate(
    model: ModelPath,
    prompt: Annotated[
        str | None, typer.Option(help="Instruction to follow; - reads standard input.", show_default=False)
    ] = None,
    file: PromptFile = None,
    out: AnswerFile = None,
    rows_at_once: RowsAtOnce = 16,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text without any template.")] = False,
    task: Task = None,
    vector: Vector = None,
    span: Spans = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.", min=1, max=MOST)] = 128,
    template: Template = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    contrast: WeakModel = None,
    beta: Beta = None,
    alpha: Alpha = None,
    ensemble: Others = None,
    calibrate: Calibrate = None,
    triggers: Triggers = None,
    mix: Mix = None,
    samples: Samples = 1,
    extract: Extract = None,
    gates_every: GatesEvery = 1,
    allow_changed: AllowChanged = None,
) -> None:
    """Write the answer to a prompt as it comes, or those to a file of prompts; routed adapter included."""
    _check_asked(prompt, file, out, span)
    from qd2mora.evaluation import TalkOptions

    settings = {"samples": samples, "gates_every": gates_every, "temperature": temperature, "extract": extract}
    way = asked_way((contrast, beta, alpha), (ensemble, calibrate, triggers, mix), seed=seed, **settings)
    told = TalkOptions(
        task, numbers(vector), template, max_new_tokens, temperature, top_p, seed, tuple(span or ()), way
    )
    if file is not None and out is not None:
        _answer_file(model, file, out, told, raw, rows_at_once, allow_changed or ())
    elif prompt is not None:
        _answer(model, prompt, told, raw, allow_changed or ())


def _check_asked(prompt: str | None, file: Path | None, out: Path | None, span: Sequence[str] | None) -> None:
    """Refuse what asks for nothing, or for two things. Raises InputRefused."""
    if (prompt is None) == (file is None):
        raise InputRefused("--prompt: name a prompt, or with --file and --out a file of them")
    if (file is None) != (out is None):
        raise InputRefused("--out: goes with --file, as --file does with it: prompts in one, answers in the other")
    if file is not None and span:
        raise InputRefused("--span: marks letters of one --prompt; prompts of a file have none")


def _answer(model: Path, prompt: str, options: Any, raw: bool, allow_changed: Sequence[str]) -> None:
    from qd2mora.evaluation import generate as run_generation

    if prompt == "-":
        prompt = _read(sys.stdin.read)
    prompt = text_of(prompt, "--prompt")
    run_generation(model, prompt, options, raw=raw, write=_show, say=_say, allow_changed=allow_changed)
    typer.echo()


def _answer_file(
    model: Path, file: Path, out: Path, options: Any, raw: bool, rows_at_once: int, allow_changed: Sequence[str]
) -> None:
    from qd2mora.evaluation import ManyOptions, generate_file

    how = ManyOptions(options, raw, rows_at_once)
    with listening(KEPT):
        number = generate_file(model, file, out, how, say=_say, allow_changed=allow_changed)
    typer.echo(f"{number} answers in {out}")


@app.command()
def chat(
    model: ModelPath,
    task: Task = None,
    vector: Vector = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.", min=1, max=MOST)] = 512,
    template: Template = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    allow_changed: AllowChanged = None,
) -> None:
    """Talk, line by line from standard input; /new forgets what was said, the end of input ends it.

    Where no chat template words the conversation, each line is an instruction of its own, as in training.
    """
    from qd2mora.evaluation import TalkOptions
    from qd2mora.evaluation import chat as run_chat

    options = TalkOptions(task, numbers(vector), template, max_new_tokens, temperature, top_p, seed)
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
