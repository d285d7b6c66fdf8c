"""The server: OpenAI's interface on a real socket, batched answers as single ones, broken clients told so."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from exported import make_run

from qd2mora.cli import main
from qd2mora.errors import InputRefused
from qd2mora.evaluation import TalkOptions, generate
from qd2mora.merging import ExportOptions, merge

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from in_thread import in_thread

from qd2mora.serving.app import Limits, build_app
from qd2mora.serving.engine import Engine
from qd2mora.serving.running import ServerOptions
from qd2mora.serving.served import Served, open_all

TEXTS = ["red sun", "one two three", "moon", "blue " * 20, "bird", "green cat dog", "two", "star star"]
KEY = "a-key-of-the-tests"


@dataclass
class Server:
    """A server on a port of this machine."""

    port: int
    engine: Engine
    served: dict[str, Served]

    def send(self, path: str, body: object = None, **headers: str) -> tuple[int, Any]:
        """Return status and content of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = None
        if body is not None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers = {"Content-Type": "application/json"} | headers
        connection.request("GET" if content is None else "POST", path, content, headers)
        reply = connection.getresponse()
        text = reply.read()
        connection.close()
        if reply.headers["content-type"].startswith("application/json"):
            return reply.status, json.loads(text)
        return reply.status, text.decode()

    def complete(self, model: str, prompt: str, **more: object) -> str:
        """Return a text's continuation."""
        status, content = self.send("/v1/completions", {"model": model, "prompt": prompt, "max_tokens": 12, **more})
        assert status == 200, content
        return content["choices"][0]["text"]

    def wait_until_idle(self) -> None:
        """Wait until no place is taken any more."""
        until = time.monotonic() + 20
        while self.engine.num_running or self.engine.num_waiting:
            assert time.monotonic() < until
            time.sleep(0.02)

    def chunks(self, path: str, body: dict[str, object]) -> list[Any]:
        """Return the events of a stream."""
        status, text = self.send(path, body | {"stream": True})
        assert status == 200 and text.endswith("data: [DONE]\n\n")
        return [json.loads(each.removeprefix("data: ")) for each in text.split("\n\n")[:-2]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    run = make_run(folder, "d2mora")
    make_run(folder, "moelora")
    merge(run, folder / "hf", ExportOptions(dtype="float32", strategy="mean_gate", measured_rows=0))
    return folder


def running(served: dict[str, Served], stack: ExitStack, limits: Limits, key: str | None = None) -> Server:
    engine = Engine(rows_at_once=8, max_waiting=64)
    app = build_app(served, engine, limits, key, None if key else ["127.0.0.1"])
    return Server(stack.enter_context(in_thread(app, engine)), engine, served)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with ExitStack() as stack:
        adapters = {"tasks": folder / "run-moelora-nf4", "static": folder / "hf"}
        served = open_all(folder / "run-d2mora-nf4", adapters, None, stack)
        yield running(served, stack, Limits(max_tokens=64, max_body=4096, timeout_s=60))


RUN = "run-d2mora-nf4"


def chat(model: str, *texts: str, **more: object) -> dict[str, object]:
    messages = [{"role": "user", "content": text} for text in texts]
    return {"model": model, "messages": messages, "max_tokens": 12, **more}


def request_of(body: dict[str, object]) -> bytes:
    """Return the bytes of a request."""
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content


def test_every_adapter_task_and_base_has_a_name(server: Server) -> None:
    status, content = server.send("/v1/models")
    names = [each["id"] for each in content["data"]]
    assert status == 200 and names == [
        *(RUN, f"{RUN}:first", f"{RUN}:last", f"{RUN}:base"),
        *("tasks:first", "tasks:last", "tasks:base", "static"),
    ]
    assert server.send(f"/v1/models/{RUN}:base")[1]["id"] == f"{RUN}:base"
    assert server.send("/health")[1]["status"] == "ok"


def test_answers_are_those_of_generate_routed_static_by_task_and_of_the_base(folder: Path, server: Server) -> None:
    options = TalkOptions(max_new_tokens=12)
    for text in TEXTS[:3]:
        assert server.complete(RUN, text) == generate(folder / RUN, text, options, raw=True)
        assert server.complete("static", text) == generate(folder / "hf", text, options, raw=True)
    by_task = TalkOptions(max_new_tokens=12, task="last")
    assert server.complete("tasks:last", "red") == generate(folder / "run-moelora-nf4", "red", by_task, raw=True)
    status, content = server.send("/v1/chat/completions", chat(RUN, "red sun"))
    assert status == 200 and content["object"] == "chat.completion"
    assert content["choices"][0]["message"]["content"] == generate(folder / RUN, "red sun", options)
    subject = server.served[f"{RUN}:base"].subject
    assert not subject.is_adapted and server.complete(f"{RUN}:base", "red sun") != server.complete(RUN, "red sun")


def test_adapters_of_one_base_share_its_weights(server: Server) -> None:
    first, second = (server.served[name].subject.plain for name in (RUN, "tasks:first"))
    assert first is not second
    assert first.model.embed_tokens.weight.data_ptr() == second.model.embed_tokens.weight.data_ptr()
    layers = (model.model.layers[1].self_attn.o_proj.weight for model in (first, second))
    assert len({layer.data_ptr() for layer in layers}) == 1


def test_32_clients_at_once_get_what_each_would_get_alone(server: Server) -> None:
    wanted = {text: server.complete(RUN, text) for text in TEXTS}
    drawn = {text: server.complete(RUN, text, temperature=1.2, top_p=0.9, seed=3) for text in TEXTS}
    assert len(set(wanted.values())) > 4 and wanted != drawn

    def ask(place: int) -> bool:
        text = TEXTS[place % len(TEXTS)]
        if place % 3 == 0:
            body = {"model": RUN, "prompt": text, "max_tokens": 12}
            chunks = server.chunks("/v1/completions", body)
            return "".join(each["choices"][0]["text"] for each in chunks) == wanted[text]
        if place % 3 == 1:
            return server.complete(RUN, text, temperature=1.2, top_p=0.9, seed=3) == drawn[text]
        return server.complete(RUN, text) == wanted[text]

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(ask, range(96)))
    server.wait_until_idle()


def test_a_stream_is_the_whole_answer_in_pieces_with_usage(server: Server) -> None:
    _, whole = server.send("/v1/chat/completions", chat(RUN, "red sun", n=2, temperature=1.0, seed=5))
    body = chat(RUN, "red sun", n=2, temperature=1.0, seed=5, stream_options={"include_usage": True})
    *chunks, last = server.chunks("/v1/chat/completions", body)
    for number in (0, 1):
        choices = [each["choices"][0] for each in chunks if each["choices"][0]["index"] == number]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(each["delta"].get("content", "") for each in choices)
        assert text == whole["choices"][number]["message"]["content"]
        finishes = [each["finish_reason"] for each in choices]
        assert finishes[-1] == whole["choices"][number]["finish_reason"] and set(finishes[:-1]) == {None}
    assert len(chunks) > 8 and last["usage"] == whole["usage"] and last["choices"] == []
    texts = {choice["message"]["content"] for choice in whole["choices"]}
    assert len(texts) == 2 and whole["usage"]["total_tokens"] == sum(list(whole["usage"].values())[:2])


def test_stops_and_log_probabilities(server: Server) -> None:
    text = server.complete(RUN, "red sun")
    stop = text[len(text) // 2 :][:3]
    assert server.complete(RUN, "red sun", stop=[stop]) == text.split(stop)[0] != text
    _, content = server.send("/v1/chat/completions", chat(RUN, "red sun", logprobs=True, top_logprobs=3))
    told = content["choices"][0]["logprobs"]["content"]
    assert len(told) == content["usage"]["completion_tokens"] == 12
    for each in told:
        assert each["logprob"] == max(top["logprob"] for top in each["top_logprobs"]) <= 0
        assert len(each["top_logprobs"]) == 3
    _, content = server.send(
        "/v1/completions", {"model": RUN, "prompt": ["red", "sun"], "max_tokens": 3, "logprobs": 2}
    )
    assert [len(each["logprobs"]["tokens"]) for each in content["choices"]] == [3, 3]


MALFORMED: list[tuple[str, object, int]] = [
    ("/v1/completions", b"{", 400),
    ("/v1/completions", b"", 400),
    ("/v1/completions", b"\xff\xfe", 400),
    ("/v1/completions", b"[" * 2000, 400),
    ("/v1/completions", b"null", 400),
    ("/v1/completions", {"model": RUN}, 400),
    ("/v1/completions", {"prompt": "a"}, 400),
    ("/v1/completions", {"model": "other", "prompt": "a"}, 404),
    ("/v1/completions", {"model": "tasks", "prompt": "a"}, 404),
    ("/v1/completions", {"model": RUN, "prompt": []}, 400),
    ("/v1/completions", {"model": RUN, "prompt": [1, 2]}, 400),
    ("/v1/completions", {"model": RUN, "prompt": "red " * 300}, 400),
    ("/v1/completions", {"model": RUN, "prompt": "red " * 2000}, 413),
    ("/v1/completions", {"model": RUN, "prompt": "a", "echo": True}, 400),
    ("/v1/completions", {"model": RUN, "prompt": "a", "vector": [1.0]}, 400),
    ("/v1/completions", {"model": RUN, "prompt": "a", "frequency_penalty": 0.5}, 400),
    ("/v1/completions", {"model": RUN, "prompt": "a", "best_of": 2}, 400),
    ("/v1/chat/completions", chat(RUN), 400),
    ("/v1/chat/completions", chat(RUN, "a", tools=[]), 400),
    ("/v1/chat/completions", chat(RUN, "a", messages=[{"role": "user"}]), 400),
    ("/v1/chat/completions", chat(RUN, "a", messages=[{"role": "robot", "content": "a"}]), 400),
    ("/v1/chat/completions", chat(RUN, "a", messages=[{"role": "assistant", "content": "a"}]), 400),
    ("/v1/chat/completions", chat(RUN, "a", messages="a"), 400),
    ("/v1/chat/completions", chat(RUN, "a", messages=[{"role": "system", "content": "b"}]), 400),
    ("/v1/nothing", {"model": RUN}, 404),
    ("/v1/models", {"model": RUN}, 405),
]
for message in (
    None,
    1,
    "a",
    [],
    {},
    {"content": "a"},
    {"role": "user", "content": None},
    {"role": "user", "content": 1},
    {"role": "user", "content": [1]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]},
    {"role": "user", "content": [{"type": "text"}]},
    {"role": "user", "content": {"text": "a"}},
    {"role": None, "content": "a"},
    {"role": "", "content": "a"},
    {"role": ["user"], "content": "a"},
    {"role": "tool", "content": "a"},
    {"role": "developer", "content": "a"},
    {"role": "function", "content": "a", "name": "f"},
):
    MALFORMED.append(("/v1/chat/completions", {"model": RUN, "messages": [message]}, 400))
for prompt in (None, 1, True, {}, [None], [["a"]], [1.5], {"text": "a"}, ["a"] * 100):
    MALFORMED.append(("/v1/completions", {"model": RUN, "prompt": prompt}, 400))
for place in (
    "/v1//models",
    "/v1/responses",
    "/metrics",
    "/v1/chat",
    "/v1/embeddings",
    "/v1/files",
    "/v2/completions",
    "/docs",
    "/admin",
    "/v1",
):
    MALFORMED.append((place, {"model": RUN, "prompt": "a"}, 404))
for raw in (
    b"[]",
    b"1",
    b'"a"',
    b"true",
    b'{"model": ',
    b"{'model': 1}",
    b'{"model": NaN}',
    b"\x00",
    b"\xef\xbb\xbf{",
    b"{}{}",
):
    MALFORMED += [("/v1/completions", raw, 400), ("/v1/chat/completions", raw, 400)]
FIELDS: dict[str, list[object]] = {
    "max_tokens": [0, -1, 1.5, "12", 65, 10**30, [], {}, True],
    "temperature": [-0.1, 2.1, "warm", 1e-9, [], {}, True],
    "top_p": [0, -1, 1.1, "most", [], {}],
    "n": [0, -1, 9, 1.5, "one", []],
    "seed": [-1, 2**32, 0.5, "seed", []],
    "stop": ["", [""], ["a"] * 5, ["a", 1], 5, "a" * 201, {}],
    "stream": ["yes", 1, [], {}],
    "stream_options": [True, {"usage": True}, []],
    "logprobs": ["yes", -1, 21, {}],
    "model": [None, 1, [], {}, "", "a" * 500, "\x00"],
    "unknown": [1],
}
for name, values in FIELDS.items():
    for each in values:
        status = 404 if name == "model" and isinstance(each, str) else 400
        MALFORMED.append(("/v1/chat/completions", chat(RUN, "a") | {name: each}, status))
        MALFORMED.append(("/v1/completions", {"model": RUN, "prompt": "a", name: each}, status))


def test_fields_of_drawing_mean_what_they_mean_in_a_terminal(server: Server) -> None:
    # Clients name both; at temperature 0 nothing is drawn.
    assert server.complete(RUN, "red sun", temperature=0, top_p=0.5) == server.complete(RUN, "red sun")
    status, content = server.send("/v1/completions", {"model": RUN, "prompt": "a", "temperature": 1e-9})
    assert status == 400 and content["error"]["message"].startswith("temperature: 1e-09 will not do: 0 for the like")
    status, content = server.send("/v1/completions", {"model": RUN, "prompt": "a", "vector": [1.0]})
    assert status == 400 and content["error"]["message"] == "vector: this model reads none"


def test_what_is_malformed_is_told_so_and_never_a_traceback(server: Server) -> None:
    for path, body, status in MALFORMED:
        found, content = server.send(path, body)
        assert found == status, (path, body, content)
        assert content["error"]["message"] and "Traceback" not in content["error"]["message"]
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        body = json.dumps(chat(RUN, "a")).encode()
        assert server.send("/v1/chat/completions", body, **{"Content-Type": content_type})[0] == 415
    for raw in (b"GARBAGE\r\n\r\n", b"GET /\x00 HTTP/1.1\r\n\r\n", b"POST /v1/completions HTTP/9.9\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(raw)
            assert connection.recv(64).startswith(b"HTTP/1.1 400")
    assert len(MALFORMED) >= 200 and server.complete(RUN, "red sun")


def test_a_page_of_elsewhere_cannot_call_it_by_another_name(server: Server) -> None:
    assert server.send("/v1/models", Host="evil.example")[0] == 400


def test_a_client_that_hangs_up_frees_its_place(server: Server) -> None:
    request = request_of({"model": RUN, "prompt": "red", "max_tokens": 64, "stream": True, "temperature": 1})
    for stream in (True, False):
        sent = request if stream else request.replace(b'"stream": true', b'"stream": null')
        for _ in range(8):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
                connection.sendall(sent)
                time.sleep(0.02)
        server.wait_until_idle()
    assert server.complete(RUN, "red sun")


def test_a_slow_body_holds_up_nobody(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        connection.sendall(b'Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"model"')
        assert server.complete(RUN, "red sun")


def test_more_than_may_wait_are_told_to_come_again(folder: Path, server: Server) -> None:
    with ExitStack() as stack:
        other = running(server.served, stack, Limits(max_tokens=64))
        other.engine.max_waiting = 0
        status, content = other.send("/v1/completions", {"model": RUN, "prompt": "a"})
        assert status == 429 and "try again" in content["error"]["message"]


def test_an_answer_that_takes_too_long_ends_there(server: Server) -> None:
    with ExitStack() as stack:
        other = running(server.served, stack, Limits(max_tokens=250, timeout_s=0.05))
        body = {"model": RUN, "prompt": "a", "max_tokens": 250, "temperature": 1, "seed": 1}
        status, content = other.send("/v1/completions", body)
        assert status == 200 and content["choices"][0]["finish_reason"] in ("length", "stop")
        assert content["usage"]["completion_tokens"] < 250


def test_with_a_key_nobody_without_it_is_answered(server: Server) -> None:
    with ExitStack() as stack:
        other = running(server.served, stack, Limits(), key=KEY)
        for path, body in (("/v1/models", None), ("/v1/completions", {"model": RUN, "prompt": "a"})):
            assert other.send(path, body)[0] == 401
            assert other.send(path, body, Authorization="Bearer wrong")[0] == 401
            assert other.send(path, body, Authorization=f"Bearer {KEY}")[0] == 200
        status, page = other.send("/")
        assert status == 200 and page.startswith("<!doctype html>")
        # One file: nothing comes from elsewhere, and what models write is shown as text.
        assert not re.search(r"https?:|src=|href=|innerHTML|eval\(", page)
        assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_a_server_open_to_others_wants_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.0.2", "example.org"):
        with pytest.raises(InputRefused, match="opens the server to others; give it a --key"):
            ServerOptions(host=host).check()
        ServerOptions(host=host, key=KEY).check()
    for host in ("127.0.0.1", "::1", "localhost"):
        ServerOptions(host=host).check()
    with pytest.raises(InputRefused, match="at least 8 characters"):
        ServerOptions(key="short").check()


@pytest.mark.long
def test_a_signal_lets_what_runs_end_and_the_log_tells_nothing_of_it(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "qd2mora", "serve", str(folder / RUN), "--port", str(port)]
    log = tmp_path / "log"
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        other = Server(port, Engine(), {})
        until = time.monotonic() + 120
        while "has a page to chat" not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        time.sleep(0.5)
        body = {"model": RUN, "prompt": "unheard", "max_tokens": 200, "temperature": 1, "seed": 2}
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(other.send, "/v1/completions", body)
            while not other.send("/health")[1]["running"]:
                assert not answer.done()
            process.send_signal(signal.SIGTERM)
            status, content = answer.result(60)
        assert process.wait(60) == 0
    assert status == 200 and content["choices"][0]["finish_reason"] in ("stop", "length")
    assert "ended: what ran is finished" in log.read_text() and "unheard" not in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--adapter", "maths"], "--adapter: 'maths' will not do: NAME=RUN"),
        (["--adapter", "a=b", "--adapter", "a=c"], "--adapter: a name is given twice"),
        (["--host", "0.0.0.0"], "opens the server to others"),
        (["--key", "short"], "at least 8 characters"),
    ],
)
def test_what_will_not_do_is_one_line(
    folder: Path, arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["qd2mora", "serve", str(folder / RUN), *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and words in line


def test_a_missing_package_is_said_with_how_to_install_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setattr(sys, "argv", ["qd2mora", "serve", str(folder / RUN)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "pip install 'qd2mora[serve]'" in capsys.readouterr().err


def test_the_official_client_reads_all_of_it(server: Server) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        assert RUN in [each.id for each in client.models.list()]
        asked: dict[str, Any] = {"model": RUN, "messages": [{"role": "user", "content": "red sun"}], "max_tokens": 12}
        whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
        stream = client.chat.completions.create(**asked, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == whole.choices[0].message.content and whole.usage.completion_tokens == 12
        assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
        done = client.completions.create(model=RUN, prompt="red sun", max_tokens=12)
        assert done.choices[0].text == server.complete(RUN, "red sun")
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            client.chat.completions.create(**(asked | {"max_tokens": 1000}))
        with pytest.raises(openai.NotFoundError, match="no 'gpt'"):
            client.chat.completions.create(**(asked | {"model": "gpt"}))


@pytest.mark.long
def test_2000_requests_of_32_clients_leave_no_place_taken_and_memory_flat(server: Server) -> None:
    wanted = {text: server.complete(RUN, text) for text in TEXTS}
    resident = psutil.Process().memory_info

    def ask(place: int) -> bool:
        text = TEXTS[place % len(TEXTS)]
        if place % 10 == 9:  # one that hangs up
            with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
                connection.sendall(request_of({"model": RUN, "prompt": text, "max_tokens": 64, "stream": True}))
            return True
        if place % 2:
            body = {"model": RUN, "prompt": text, "max_tokens": 12}
            chunks = server.chunks("/v1/completions", body)
            return "".join(each["choices"][0]["text"] for each in chunks) == wanted[text]
        return server.complete(RUN, text) == wanted[text]

    sizes = []
    with ThreadPoolExecutor(32) as pool:
        for part in range(4):
            assert all(pool.map(ask, range(part * 500, part * 500 + 500)))
            server.wait_until_idle()
            sizes.append(resident().rss)
    assert max(sizes[1:]) < 1.02 * sizes[0], sizes
