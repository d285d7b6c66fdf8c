"""A server from its start to its end: what is opened, who may call, and that what runs is finished."""

import ipaddress
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from qd2mora.errors import InputRefused
from qd2mora.serving.app import Limits, build_app
from qd2mora.serving.engine import Engine
from qd2mora.serving.served import open_all

MOST_CONNECTIONS = 512


@dataclass(frozen=True)
class ServerOptions:
    """Where a server listens, who may call it, and how much it takes on."""

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    template: str | None = None
    rows_at_once: int = 16
    max_waiting: int = 64
    limits: Limits = field(default_factory=Limits)

    def check(self) -> None:
        """Raises InputRefused where others could call it without a key."""
        if self.key is not None and len(self.key) < 8:
            raise InputRefused("--key: at least 8 characters, for example of `openssl rand -hex 16`")
        if not self.is_local and self.key is None:
            raise InputRefused(
                f"--host: '{self.host}' opens the server to others; give it a --key, or leave --host out"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can call it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def serve(model: Path, adapters: Mapping[str, Path], options: ServerOptions, say: Callable[[str], object]) -> None:
    """Serve until a signal comes; then what runs and waits is finished. Raises InputRefused, DamagedFile."""
    options.check()
    with ExitStack() as stack:
        served = open_all(model, adapters, options.template, stack)
        for each in served.values():
            say(f"model {each.name}: {each.prompting.line}")
        engine = Engine(options.rows_at_once, options.max_waiting)
        # Without a key, what keeps a page of elsewhere out is the name it would have to call by.
        hosts = ["127.0.0.1", "localhost", options.host] if options.key is None else None
        app = build_app(served, engine, options.limits, options.key, hosts)
        config = uvicorn.Config(
            app,
            host=options.host,
            port=options.port,
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_keep_alive=20,
        )
        server = uvicorn.Server(config)
        engine.start()
        say(f"http://{options.host}:{options.port} has a page to chat, /v1 is for OpenAI's clients; Ctrl-C ends it")
        try:
            with _left_to_server():
                server.run()
        finally:
            engine.stop()
        if not server.started:
            raise InputRefused(f"--port: cannot listen at {options.host}:{options.port}; name another")
    say("ended: what ran is finished")


@contextmanager
def _left_to_server() -> Iterator[None]:
    """Leave signals to uvicorn, which raises them once more when it has ended: that is then no news."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


__all__ = ["ServerOptions", "serve"]
