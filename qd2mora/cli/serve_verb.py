"""The verb that serves a model: serve."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from qd2mora.cli.app import MOST, ModelPath, app
from qd2mora.cli.groups import grouped
from qd2mora.errors import InputRefused

Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="One more to choose by the model field; may be given often.", metavar="NAME=RUN"),
]


@dataclass(frozen=True)
class AddressOptions:
    """Where the server listens, and for whom."""

    host: Annotated[str, typer.Option(help="Address to listen at; one that others reach needs --key.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000
    key: Annotated[str | None, typer.Option(help="What clients must bring; else $QD2MORA_KEY.", show_default=False)] = (
        None
    )


@dataclass(frozen=True)
class LimitOptions:
    """How much it takes on, and what one client may ask."""

    rows_at_once: Annotated[int, typer.Option(help="Answers of a batch.", min=1, max=4096)] = 16
    max_waiting: Annotated[
        int, typer.Option(help="Requests that may wait; more are told to come again.", min=1, max=MOST)
    ] = 64
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.", min=1, max=MOST)] = 2048
    max_body: Annotated[int, typer.Option(help="Bytes of a request at most.", min=1024, max=MOST)] = 1 << 20
    timeout: Annotated[float, typer.Option(help="Seconds of a request at most.", min=1, max=MOST)] = 300.0


@app.command()
@grouped
def serve(
    model: ModelPath,
    adapter: Adapters = None,
    *,
    address: AddressOptions,
    template: Annotated[
        str | None, typer.Option(help="Wording of messages: instruction, tokenizer, chatml, plain.")
    ] = None,
    limit: LimitOptions,
) -> None:
    """Serve runs, exports or a base as OpenAI's interface does, with a page to chat; routed adapters included."""
    adapters = dict(_named(each) for each in adapter or ())
    if len(adapters) < len(adapter or ()):
        raise InputRefused("--adapter: a name is given twice")
    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise InputRefused(f"serve needs the package {package}: pip install 'qd2mora[serve]'")
    from qd2mora.serving.app import Limits
    from qd2mora.serving.running import ServerOptions
    from qd2mora.serving.running import serve as run_server

    limits = Limits(limit.max_tokens, limit.max_body, limit.timeout)
    key = address.key or os.environ.get("QD2MORA_KEY") or None
    options = ServerOptions(address.host, address.port, key, template, limit.rows_at_once, limit.max_waiting, limits)
    run_server(model, adapters, options, lambda line: typer.echo(line, err=True))


def _named(text: str) -> tuple[str, Path]:
    name, is_given, path = text.partition("=")
    if not (name and is_given and path):
        raise InputRefused(f"--adapter: '{text}' will not do: NAME=RUN, for example maths=runs/maths")
    return name, Path(path)


__all__ = ["serve"]
