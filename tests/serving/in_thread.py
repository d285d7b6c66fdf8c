"""A server of this process, on a port of its own, for as long as a block runs."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from qd2mora.serving.engine import Engine


@contextmanager
def in_thread(app: Any, engine: Engine) -> Iterator[int]:
    """Serve an app; yields its port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    engine.start()
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        engine.stop()
