"""The HTTP interface: OpenAI's paths on our engine, with limits on length, body, queue and time, and the chat page."""

import asyncio
import hmac
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from qd2mora.errors import InputRefused
from qd2mora.evaluation.decoding import Wanted
from qd2mora.evaluation.prompting import Messages
from qd2mora.evaluation.talking import TalkOptions
from qd2mora.serving.bodies import Body, ChatBody, CompletionBody, Kind, read_body
from qd2mora.serving.engine import Engine, Job, Piece
from qd2mora.serving.served import Served
from qd2mora.serving.wording import Reply, Said, event, problem

PAGE = Path(__file__).with_name("page.html")
BODY_S = 20.0
"""How long a client may take to send its body."""
_LOOK_S = 0.2
"""How often a client that waits for a whole answer is looked after."""
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Limits:
    """What one client may ask: tokens of an answer, bytes of a body, seconds of a request."""

    max_tokens: int = 2048
    max_body: int = 1 << 20
    timeout_s: float = 300.0


@dataclass(frozen=True)
class Asked:
    """A checked request on its way: what it wants, and where its pieces arrive."""

    reply: Reply
    job: Job
    pieces: "asyncio.Queue[Piece]"
    answers: list[Said] = field(default_factory=list)
    is_stream: bool = False
    with_usage: bool = False


class Refused(HTTPException):
    """A request that is answered with an error, in the interface's own words."""


def build_app(
    served: Mapping[str, Served],
    engine: Engine,
    limits: Limits | None = None,
    key: str | None = None,
    hosts: list[str] | None = None,
) -> FastAPI:
    """Return the app. `hosts`: names that it may be called by; a page elsewhere must not reach it under another."""
    app = FastAPI(title="qd2mora", docs_url=None, redoc_url=None, openapi_url=None)
    desk = _Desk(served, engine, limits or Limits(), key)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    app.add_exception_handler(HTTPException, _error)
    app.add_api_route("/", _page, methods=["GET"])
    app.add_api_route("/health", desk.health, methods=["GET"])
    app.add_api_route("/v1/models", desk.models, methods=["GET"])
    app.add_api_route("/v1/models/{name}", desk.model, methods=["GET"])
    app.add_api_route("/v1/chat/completions", desk.chat, methods=["POST"])
    app.add_api_route("/v1/completions", desk.completions, methods=["POST"])
    return app


async def _error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(problem(str(error.detail)), error.status_code, headers=dict(error.headers or {}))


async def _page() -> Response:
    return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": _POLICY})


class _Desk:
    """Takes requests, and answers them."""

    def __init__(self, served: Mapping[str, Served], engine: Engine, limits: Limits, key: str | None) -> None:
        self.served, self.engine, self.limits, self.key = served, engine, limits, key
        self.began = int(time.time())

    async def health(self) -> dict[str, object]:
        """Say that the server runs, and how busy it is."""
        return {"status": "ok", "running": self.engine.num_running, "waiting": self.engine.num_waiting}

    async def models(self, request: Request) -> dict[str, object]:
        """List what can be asked."""
        self._check_key(request)
        return {"object": "list", "data": [self._about(name) for name in self.served]}

    async def model(self, request: Request, name: str) -> dict[str, object]:
        """Tell of one."""
        self._check_key(request)
        return self._about(self._served(name).name)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        body = _checked(ChatBody, await self._content(request))
        num_top = body.num_top
        return await self._answered(request, await self._asked(body, [body.conversation], body.most, num_top))

    async def completions(self, request: Request) -> Response:
        """Continue texts."""
        body = _checked(CompletionBody, await self._content(request))
        return await self._answered(
            request, await self._asked(body, body.prompts, body.max_tokens or 16, body.logprobs)
        )

    def _about(self, name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": self.began, "owned_by": "qd2mora"}

    def _served(self, name: str) -> Served:
        found = self.served.get(name)
        if found is None:
            raise Refused(404, f"model: no '{name[:100]}' here; there are {', '.join(self.served)}")
        return found

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        # In constant time: how long a wrong key takes tells nothing of how much of it is right.
        if self.key is not None and not hmac.compare_digest(given.encode(), self.key.encode()):
            raise Refused(401, "this server asks for its key: Authorization: Bearer KEY")

    async def _content(self, request: Request) -> bytes:
        """Return the body, no more than may be, no slower than may be."""
        self._check_key(request)
        # Another page's form cannot send JSON without the browser asking first, which nothing here allows.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "Content-Type: application/json is wanted")
        content = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                async for part in request.stream():
                    content += part
                    if len(content) > self.limits.max_body:
                        raise Refused(413, f"the body is longer than {self.limits.max_body} bytes")
        except TimeoutError:
            raise Refused(408, f"the body took longer than {BODY_S:g} s") from None
        return bytes(content)

    async def _asked(self, body: Body, asked: Sequence[Messages | str], most: int | None, num_top: int | None) -> Asked:
        served, limits = self._served(body.model), self.limits
        is_chat, loop = isinstance(body, ChatBody), asyncio.get_running_loop()
        if most is not None and most > limits.max_tokens:
            raise Refused(400, f"max_tokens: {most} is more than this server writes, {limits.max_tokens}")
        wanted, num_read = list[Wanted](), 0
        try:
            for each in asked:
                # Words may take a template's child a second, for which nobody else waits.
                ids = await asyncio.to_thread(served.ids_of, each)
                num_read += len(ids)
                wanted += _wanted(served, body, ids, most or limits.max_tokens, num_top or 0)
        except InputRefused as error:
            raise Refused(400, str(error).removeprefix("--")) from None  # options there are fields here
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        deadline = time.monotonic() + limits.timeout_s

        def tell(piece: Piece) -> None:
            # Called in the engine's thread, which may outlive the loop; asyncio's queues are the loop's own.
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        job = Job(served.subject, wanted, tell, num_top is not None, deadline)
        reply = Reply(body.model, is_chat, num_read, num_top)
        usage = body.stream_options is not None and body.stream_options.include_usage
        return Asked(reply, job, pieces, [Said() for _ in wanted], bool(body.stream), usage)

    async def _answered(self, request: Request, asked: Asked) -> Response:
        if not self.engine.submit(asked.job):
            raise Refused(429, "too many requests wait already; try again", headers={"Retry-After": "1"})
        if asked.is_stream:
            # Or a proxy in front would hand tokens on in lumps.
            headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache"}
            return StreamingResponse(_events(request, asked), media_type="text/event-stream", headers=headers)
        try:
            while any(said.finish is None for said in asked.answers):
                try:
                    _take(asked, await asyncio.wait_for(asked.pieces.get(), _LOOK_S))
                except TimeoutError:
                    if await request.is_disconnected():
                        # nginx's number for a client that has gone: nobody reads it but a log.
                        return Response(status_code=499)
                    _check_time(asked)
        finally:
            asked.job.is_cancelled.set()
        return JSONResponse(asked.reply.whole(asked.answers))


def _checked(kind: type[Kind], content: bytes) -> Kind:
    """Return a checked body. Raises Refused."""
    try:
        body = read_body(kind, content)
        if isinstance(body, ChatBody):
            _ = body.conversation
    except InputRefused as error:
        raise Refused(400, str(error)) from None
    return body


def _wanted(served: Served, body: Body, ids: list[int], most: int, num_top: int) -> list[Wanted]:
    """Return the answers to one prompt, each drawn by a seed of its own."""
    temperature, top_p = body.temperature or 0.0, body.top_p or 1.0
    if temperature == 0:
        top_p = 1.0  # clients name both, and nothing is drawn
    options = TalkOptions(
        task=served.task, vector=body.vector, max_new_tokens=most, temperature=temperature, top_p=top_p
    )
    one = replace(options.wanted(served.subject, ids), ends=served.prompting.ends, stops=body.stops, num_top=num_top)
    seed = secrets.randbits(31) if body.seed is None else body.seed
    return [replace(one, seed=(seed + number) % 2**32) for number in range(body.n or 1)]


def _take(asked: Asked, piece: Piece) -> None:
    """Add news to an answer. Raises Refused where it failed."""
    if piece.error is not None:
        raise Refused(500, piece.error)
    said = asked.answers[piece.number]
    said.text += piece.text
    said.tokens += piece.tokens
    said.num_tokens, said.finish = piece.num_tokens, piece.finish


def _check_time(asked: Asked) -> None:
    """Refuse what has waited too long for its turn; the engine itself ends what runs too long."""
    waited = all(not said.num_tokens for said in asked.answers)
    if waited and time.monotonic() > asked.job.deadline + 1:
        raise Refused(503, "this request waited too long for its turn; try again", headers={"Retry-After": "5"})


async def _events(request: Request, asked: Asked) -> AsyncIterator[bytes]:
    """Yield a stream's events; a client that hangs up ends this, and with it the work."""
    reply, answers = asked.reply, asked.answers
    try:
        if reply.is_chat:
            for number in range(len(answers)):
                yield event(reply.chunk(number, Said(), is_first=True))
        while any(said.finish is None for said in answers):
            try:
                piece: Piece | None = await asyncio.wait_for(asked.pieces.get(), _LOOK_S)
            except TimeoutError:
                _check_time(asked)
                piece = None
            if await request.is_disconnected():
                return
            if piece is None:
                continue
            _take(asked, piece)
            yield event(reply.chunk(piece.number, Said(piece.text, list(piece.tokens), piece.finish)))
        if asked.with_usage:
            yield event(reply.last_chunk(answers))
        yield event("[DONE]")
    except Refused as error:  # the head of the answer is sent: the stream itself says what went wrong
        yield event(problem(str(error.detail), "server_error"))
    finally:
        asked.job.is_cancelled.set()


__all__ = ["Limits", "build_app"]
