"""What a rendered conversation consists of: where in its text stand what was said, calls, results and reasoning.

The rest is the template's own. Each is looked for in turn, for `preview` to show; nothing is learned by it.
"""

import json
from collections.abc import Iterator
from typing import Any

from qd2mora.data.chat_template import Messages
from qd2mora.data.pair import CALLED, REASONED, SAID, Part


def parts_of(text: str, messages: Messages, tools: Messages) -> list[Part]:
    """Return the parts of a conversation's text in order."""
    found = [*_tools(text, tools), *_messages(text, messages)]
    parts: list[Part] = []
    for kind, start, stop in sorted(found, key=lambda part: part[1]):
        if not parts or start >= parts[-1][2]:
            parts.append((kind, start, stop))
    return parts


def _messages(text: str, messages: Messages) -> Iterator[Part]:
    place = 0
    for message in messages:
        said = CALLED if message["role"] == "tool" else SAID
        forms = [(REASONED, _forms(message.get("reasoning_content"))), (said, _forms(message.get("content")))]
        for call in message.get("tool_calls", ()):
            arguments = call["function"]["arguments"]
            forms += [(CALLED, [call["function"]["name"]]), (CALLED, _forms(arguments))]
        for kind, each in forms:
            part = _found(text, each, place)
            if part is not None:
                yield kind, *part
                place = part[1]


def _tools(text: str, tools: Messages) -> Iterator[Part]:
    for tool in tools:
        part = _found(text, [*_forms(tool), *_forms(tool.get("function")), str(tool["function"]["name"])], 0)
        if part is not None:
            yield CALLED, *part


def _forms(value: Any) -> list[str]:
    """Return the ways in which templates write a value."""
    if not value:
        return []
    whole = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str):
        return [value.strip(), whole[1:-1]]
    return [whole, json.dumps(value, ensure_ascii=False, indent=4), json.dumps(value, ensure_ascii=False, indent=2)]


def _found(text: str, forms: list[str], place: int) -> tuple[int, int] | None:
    """Return where the first of some forms stands that does, as words of their own."""
    for form in forms:
        start = text.find(form, place) if form else -1
        while start >= 0:
            stop = start + len(form)
            inside = text[start - 1 : start].isalnum() and form[0].isalnum()
            if not inside and not (text[stop : stop + 1].isalnum() and form[-1].isalnum()):
                return start, stop
            start = text.find(form, start + 1)
    return None


__all__ = ["parts_of"]
