"""The chat page in a real browser: it asks, shows what comes side by side, in light and dark, on a phone."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from exported import make_run

from qd2mora.merging import ExportOptions, merge

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from in_thread import in_thread

from qd2mora.serving.app import Limits, build_app
from qd2mora.serving.engine import Engine
from qd2mora.serving.served import open_all

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.long,  # what the page's text is made of is tested without a browser
    pytest.mark.skipif(BROWSER is None, reason="no chromium here"),
]


class Browser:
    """A headless browser, spoken to through two pipes in its DevTools protocol."""

    def __init__(self, profile: Path) -> None:
        assert BROWSER is not None
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe"
        # The browser reads descriptor 3 and writes descriptor 4.
        script = f'exec 3<&{theirs_in} 4>&{theirs_out}; exec "$0" {flags} --user-data-dir="$1" about:blank'
        self._process = subprocess.Popen(
            ["bash", "-c", script, BROWSER, str(profile)],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._number, self._rest, self.events = 0, b"", list[dict[str, Any]]()
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: object) -> Any:
        """Do one thing, and wait until it is done."""
        self._number += 1
        message: dict[str, object] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def value(self, expression: str) -> Any:
        """Return what an expression is on the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until an expression is true on the page."""
        until = time.monotonic() + 60
        while not self.value(expression):
            assert time.monotonic() < until, (expression, self.value("document.body.innerText"))
            time.sleep(0.05)

    def faults(self) -> list[str]:
        """Return what the page did wrong so far."""
        thrown = [each["params"] for each in self.events if each.get("method") == "Runtime.exceptionThrown"]
        told = [each["params"]["entry"] for each in self.events if each.get("method") == "Log.entryAdded"]
        # Advice (a key's field in no form) is no fault; a refused request is told by the page itself.
        return [json.dumps(each) for each in [*thrown, *told] if each.get("level", "error") in ("error", "warning")]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._in, 1 << 16)
            assert piece, "the browser ended"
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(line)
        return answer


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    folder = tmp_path_factory.mktemp("page")
    run = make_run(folder, "d2mora")
    merge(run, folder / "hf", ExportOptions(dtype="float32", strategy="mean_gate", measured_rows=0))
    with ExitStack() as stack:
        models = open_all(run, {"exported": folder / "hf"}, None, stack)
        engine = Engine()
        app = build_app(models, engine, Limits(max_tokens=64), None, ["127.0.0.1"])
        yield stack.enter_context(in_thread(app, engine)), folder


@pytest.fixture
def page(served: tuple[int, Path], tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(tmp_path / "profile")
    try:
        browser.call("Page.navigate", url=f"http://127.0.0.1:{served[0]}/")
        browser.wait_for("document.querySelectorAll('#models input').length >= 2")
        yield browser
    finally:
        browser.close()


def ask(page: Browser, text: str) -> None:
    page.value("document.querySelectorAll('#models input').forEach((box) => { box.checked = true; }); 1")
    page.value("document.getElementById('tokens').value = '8'; 1")
    page.value(f"document.getElementById('message').value = {json.dumps(text)}; 1")
    page.value("document.getElementById('form').requestSubmit(); 1")
    page.wait_for("running.length === 0 && document.querySelectorAll('.assistant').length >= 2")


def picture(page: Browser, name: str) -> None:
    """Keep a picture where somebody wants to look at one."""
    if "PICTURES" in os.environ:
        content = page.call("Page.captureScreenshot", format="png")["data"]
        Path(os.environ["PICTURES"], f"{name}.png").write_bytes(base64.b64decode(content))


def test_models_answer_side_by_side_as_the_interface_does(page: Browser, served: tuple[int, Path]) -> None:
    names = page.value("[...document.querySelectorAll('#models input')].map((box) => box.value)")
    ask(page, "red <b>sun</b>")
    assert page.value("document.querySelector('.user').textContent") == "red <b>sun</b>"  # shown as text
    shown = page.value("[...document.querySelectorAll('.assistant')].map((part) => part.textContent)")
    expected = []
    for name in names:
        body = {"model": name, "messages": [{"role": "user", "content": "red <b>sun</b>"}], "max_tokens": 8}
        sent = f"{{method: 'POST', headers: headers(), body: {json.dumps(json.dumps(body | {'temperature': 0}))}}}"
        reply = f"fetch('v1/chat/completions', {sent}).then((reply) => reply.json())"
        expected.append(page.value(f"{reply}.then((content) => content.choices[0].message.content)"))
    assert len(names) == 5 and shown == expected and not page.faults()


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (360, "dark"), (1200, "light"), (1200, "dark")])
def test_it_fits_a_phone_and_follows_light_and_dark(page: Browser, width: int, scheme: str) -> None:
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=700, deviceScaleFactor=1, mobile=width < 600)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    ask(page, "one two three " + "x" * 200)
    assert page.value("document.documentElement.scrollWidth") <= width
    ground = page.value("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 21, 21)")
    for part in ("#message", "button[type=submit]", ".assistant"):
        assert page.value(f"document.querySelector('{part}').getBoundingClientRect().width") > 20
    picture(page, f"chat-{width}-{scheme}")
    assert not page.faults()


def test_an_error_is_shown_where_the_answer_would_stand_and_a_new_talk_begins_empty(page: Browser) -> None:
    page.value("document.getElementById('tokens').value = '9999'; 1")
    page.value("document.getElementById('message').value = 'red'; 1")
    page.value("document.getElementById('form').requestSubmit(); 1")
    page.wait_for("document.querySelectorAll('.bad').length === 1")
    assert "max_tokens" in page.value("document.querySelector('.bad').textContent")
    page.value("document.getElementById('reset').click(); 1")
    assert page.value("document.querySelectorAll('#answers section').length") == 0
