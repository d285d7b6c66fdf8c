"""A tokenizer's chat template, rendered in a child process with limits: see `chat_template_child.py`.

A template comes with the tokenizer or is one of ours by name (`chat.TEMPLATES`); a recipe holds none.
"""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from qd2mora.data.file_rows import BadRow
from qd2mora.errors import InputRefused

WAIT_S = 2.0
SECONDS = 2
"""Processor time of one rendering, for a child that nobody waits for any more."""
START_S = 60.0
MEMORY = 1 << 30
"""Address space of the child."""
LONGEST = 4 << 20
LONGEST_TEMPLATE = 128 << 10

Messages = Sequence[Mapping[str, Any]]
Marked = tuple[str, list[tuple[int, int]]]
"""A text, and the stretches of it that are marked."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How transformers knows a template that marks what the assistant writes."""


class ChatTemplate:
    """Renders conversations; `with` it, and the child ends with the block.

    It starts with the first conversation: importing transformers takes it a second, which rows that are refused before
    they are worded need not wait for.
    """

    def __init__(self, template: str, tokens: dict[str, str], where: str, clock: str | None = None) -> None:
        """`tokens`: what the template may name, `bos_token` and the like; `where` names it in errors.

        `clock`: the time that it reads, in ISO form; None for now.
        """
        if len(template) > LONGEST_TEMPLATE:
            raise InputRefused(f"{where}: a chat template of {len(template)} characters (limit {LONGEST_TEMPLATE})")
        self.where = where
        self.end = tokens.get("eos_token", "")
        self.marks_answers = _GENERATION.search(template) is not None
        self.settings: dict[str, object] = {"path": sys.path, "template": template, "tokens": tokens, "clock": clock}
        self.settings |= {"memory": MEMORY, "seconds": SECONDS, "longest": LONGEST}
        self._is_started = False

    def __enter__(self) -> Self:
        return self

    def start(self) -> None:
        """Start the child where it is not there yet, as the first rendering does. Raises InputRefused."""
        if self._is_started:
            return
        self.child = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("chat_template_child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
        )
        self._is_started = True
        # A thread reads, as not every system can wait for a pipe and a clock at once.
        self.lines: queue.Queue[bytes] = queue.Queue()
        self.reader = threading.Thread(
            target=_read_lines, args=(self._pipe(self.child.stdout), self.lines), daemon=True
        )
        self.reader.start()
        self._send(self.settings)
        self._line(START_S)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_started:
            return
        self.child.kill()
        self.child.wait()
        self.reader.join()
        for pipe in (self.child.stdin, self.child.stderr):
            with suppress(OSError):  # what was not sent is not wanted any more
                self._pipe(pipe).close()

    def render(self, messages: Messages, *, asking: bool = False, tools: Messages = ()) -> str:
        """Return the text of a conversation; `asking`: up to where the assistant's next answer begins.

        Raises BadRow where the template refuses the conversation, InputRefused where the template itself will not do.
        """
        return self.render_each([messages], asking=asking, tools=tools)[0]

    def render_each(
        self, conversations: Sequence[Messages], *, asking: bool = False, tools: Messages = ()
    ) -> list[str]:
        """Return the text of each conversation, as `render` does."""
        texts: list[str] = self._rendered(conversations, tools, add_generation_prompt=asking)["texts"]
        return texts

    def render_marked(self, conversations: Sequence[Messages], tools: Messages = ()) -> list[Marked]:
        """Return the text of each conversation with what the template marks as generated, by transformers' own count.

        Nothing is where a template has no such marks.
        """
        if not self.marks_answers:
            return [(text, []) for text in self.render_each(conversations, tools=tools)]
        answer = self._rendered(conversations, tools, return_assistant_tokens_mask=True)
        spans = [[(start, stop) for start, stop in each] for each in answer["spans"]]
        return list(zip(answer["texts"], spans, strict=True))

    def _rendered(self, conversations: Sequence[Messages], tools: Messages, **how: bool) -> dict[str, Any]:
        self.start()
        self._send({"conversations": [list(each) for each in conversations], "tools": list(tools) or None, **how})
        answer: dict[str, Any] = json.loads(self._line(WAIT_S))
        if "refused" in answer:
            raise BadRow("the chat template refuses it", f": {answer['refused']}")
        return answer

    def _send(self, content: object) -> None:
        try:
            self._pipe(self.child.stdin).write(json.dumps(content).encode() + b"\n")
            self._pipe(self.child.stdin).flush()
        except OSError:  # a broken pipe, in each system's words
            raise InputRefused(f"{self.where}: the chat template {self._end()}") from None

    def _line(self, wait_s: float) -> bytes:
        """Return one whole line: a child that stops halfway must not stop us."""
        try:
            line = self.lines.get(timeout=wait_s)
        except queue.Empty:
            line = b""
        if not line.endswith(b"\n"):
            raise InputRefused(f"{self.where}: the chat template {self._end()}")
        return line

    def _end(self) -> str:
        """Say why the child is at its end; end it."""
        try:
            code = self.child.wait(0.2)
        except subprocess.TimeoutExpired:
            return f"took more than {WAIT_S:g} s"
        if hasattr(signal, "SIGXCPU") and code == -signal.SIGXCPU:
            return f"took more than {SECONDS} s of processor time"
        lines = self._pipe(self.child.stderr).read().decode(errors="replace").strip().splitlines()
        return f"will not do: {lines[-1][:200] if lines else f'its process ended with {code}'}"

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe


def _environment() -> dict[str, str]:
    """Return what the child may know: nothing of ours, but for what Windows starts no program without."""
    needed = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
    return {"PATH": os.defpath, "PYTHONIOENCODING": "utf-8", **needed}


def _read_lines(pipe: IO[bytes], lines: queue.Queue[bytes]) -> None:
    """Pass on line by line, then an empty one for the end."""
    with pipe:
        for line in pipe:
            lines.put(line)
    lines.put(b"")


def reads_clock(template: str) -> bool:
    """Tell whether a template words the time of its rendering."""
    return "strftime_now" in template


__all__ = ["ChatTemplate", "Marked", "Messages", "reads_clock"]
