"""A row of the chat format as a template takes it: OpenAI's messages and ShareGPT's, by the names that are common.

What changes what is learned is read or refused, never passed over: which messages are learned, calls of tools and
their results, reasoning. docs/data.md says what is done with each.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qd2mora.data.file_rows import BadRow, Repeated
from qd2mora.data.row_format import Fields, RowFormat
from qd2mora.data.row_keys import LEARNED, MASKED, unread_keys_of_message
from qd2mora.data.row_text import check_json, check_text, from_json, says_something, shortened
from qd2mora.data.spans import Span

FORMAT = RowFormat(
    ("messages",),
    None,
    texts=(),
    optional=("system", "tools"),
    inner=("role", "content"),
    built=("tools",),
    aliases={
        "messages": ("conversations", "conversation"),
        "tools": ("functions",),
        "role": ("from",),
        "content": ("value",),
    },
)
ROLES = ("system", "user", "assistant", "tool")
REASONING = ("reasoning_content", "reasoning", "thinking")

_SAME = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call", "tool_calls"), "assistant"),
}
_CALLING = ("function_call", "tool_call", "tool_calls")  # roles whose content is a call, in ShareGPT's way

UNLEARNED = "have answers that a field leaves out of what is learned (weight: 0 and the like)"
_OTHERS = "ask to learn messages of others; answers alone are learned"
_IN_A_ROW = "have messages of one role in a row; they are worded as they are"
_EMPTY = "have an empty message of the user; it is worded as it is"
_AFTER = "go on after the last answer that is learned; that is left out"

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages and tools as a template takes them. `is_learned`: of each message, whether it is.

    `unread`: keys of messages that nothing reads; `remarks`: what one would not expect of it.
    """

    messages: tuple[Message, ...]
    is_learned: tuple[bool, ...]
    tools: tuple[dict[str, Any], ...] = ()
    unread: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    spans: tuple[Span, ...] | None = None
    """Marked spans of messages' contents; None where the data marks none."""

    @property
    def last(self) -> int:
        """The number of the last message that is learned."""
        return max(number for number, is_learned in enumerate(self.is_learned) if is_learned)


def read_conversation(fields: Fields, names: Mapping[str, str]) -> Conversation:
    """Return a row's conversation; `names`: what a recipe calls the parts of a message. Raises BadRow."""
    given = fields["messages"]
    if isinstance(given, str) and given.lstrip().startswith("["):  # as csv files hold it
        given = from_json("field 'messages'", given)
    for each in given if isinstance(given, list) else ():
        if isinstance(each, Repeated):
            check_json("messages", each)
    if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
        raise BadRow("'messages' should be a list of objects")
    read = [_read(message, names) for message in given]
    messages = tuple(message for message, _, _ in read)
    _refuse_order(messages)
    answers = [message for message in messages if message["role"] == "assistant"]
    is_learned = tuple(message["role"] == "assistant" and flag is not False for message, flag, _ in read)
    taught = [message for message, flag in zip(messages, is_learned, strict=True) if flag]
    if not answers or any(_is_empty(message) for message in taught):
        raise BadRow("an assistant's message is missing or empty", ", there is nothing to learn")
    if not taught:
        raise BadRow("no message is learned", ", there is nothing to learn")
    unread = tuple(dict.fromkeys(key for _, _, keys in read for key in keys))
    talk = Conversation(messages, is_learned, _tools(fields.get("tools")), unread)
    asks = any(flag and message["role"] != "assistant" for message, flag, _ in read)
    return replace(with_system(talk, fields.get("system")), remarks=tuple(_remarks(talk, asks)))


def as_conversation(row: Fields) -> Conversation:
    """Return an instruction row as a conversation of one turn."""
    asked = [row[name] for name in ("instruction", "input") if row.get(name)]
    turns = ({"role": "user", "content": "\n\n".join(asked)}, {"role": "assistant", "content": row["output"]})
    return with_system(Conversation(turns, (False, True)), row.get("system"))


def with_system(talk: Conversation, system: str | None) -> Conversation:
    """Return a conversation that begins with what the row's own field `system` says. Raises BadRow."""
    if not system:
        return talk
    if talk.messages[0]["role"] != "system":
        first: Message = {"role": "system", "content": system}
        spans = talk.spans
        if spans is not None:
            spans = tuple(span._replace(place=int(span.place) + 1) for span in spans)
        return replace(talk, messages=(first, *talk.messages), is_learned=(False, *talk.is_learned), spans=spans)
    if talk.messages[0]["content"] != system:
        raise BadRow("field 'system' and the first message are two system messages", ", and they differ")
    return talk


def _read(theirs: Message, names: Mapping[str, str]) -> tuple[Message, bool | None, list[str]]:
    """Return one message as templates take it, what is said of learning it, and the keys that nothing reads."""
    role_name, content_name = (_name_in(theirs, name, names) for name in FORMAT.inner)
    said = theirs.get(role_name)
    role = _SAME.get(said.strip().lower()) if isinstance(said, str) else None
    if role is None:
        raise BadRow(f"a message's role should be one of {', '.join(ROLES)}", f", it is {shortened(said)}")
    message: Message = {"role": role}
    read = [role_name, content_name, *LEARNED, *MASKED]
    if role == "assistant":
        reasoning = next((name for name in REASONING if says_something(theirs.get(name))), REASONING[0])
        read += [reasoning, "tool_calls", "function_call"]
        if says_something(theirs.get(reasoning)):
            check_text(reasoning, theirs[reasoning])
            message["reasoning_content"] = theirs[reasoning]
    if role == "tool":
        read += ["name", "tool_call_id"]
        for name in ("name", "tool_call_id"):
            if says_something(theirs.get(name)):
                check_text(name, theirs[name])
                message[name] = theirs[name]
    if isinstance(said, str) and said.strip().lower() in _CALLING:
        message["tool_calls"] = _calls(theirs.get(content_name))
    else:
        message |= _content(theirs, content_name, role)
    return message, _is_learned(theirs), unread_keys_of_message(theirs, read)


def _name_in(message: Message, name: str, names: Mapping[str, str]) -> str:
    if name in names:
        return names[name]
    return next((each for each in (name, *FORMAT.aliases[name]) if message.get(each) is not None), name)


def _content(theirs: Message, name: str, role: str) -> Message:
    """Return content and calls of a message."""
    made: Message = {}
    content = theirs.get(name)
    if isinstance(content, list):
        content = "".join(_text_parts(content))
    called = theirs.get("tool_calls")
    if not says_something(called):
        called = theirs.get("function_call")
    if role == "assistant" and says_something(called):
        made["tool_calls"] = _calls(called)
    if content is not None or not made:
        if not isinstance(content, str):
            raise BadRow("a message's content should be text", f", it is {shortened(content)}")
        check_text("content", content)
        made = {"content": content, **made}
    return made


def _text_parts(parts: list[object]) -> Iterator[str]:
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise BadRow("a message's content should be text", f", a part of it is {shortened(kind)}")
        yield text


def _calls(value: object) -> list[Message]:
    """Return calls in OpenAI's shape; arguments stay what they came as, text or object. Raises BadRow."""
    value = from_json("tool calls", value)
    calls = [value] if isinstance(value, dict) else value
    if not isinstance(calls, list) or not calls:
        raise BadRow("field 'tool_calls' should be a list of calls", f", it is {shortened(value)}")
    made = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
            raise BadRow("a tool call names no function")
        given = function.get("arguments")
        arguments = from_json("a tool call's arguments", {} if given is None else given)
        check_json("arguments", arguments)
        if not isinstance(arguments, dict):
            raise BadRow("a tool call's arguments should be an object", f", they are {shortened(arguments)}")
        whole = {**function, "arguments": {} if given is None else given}
        rest = {} if function is call else {key: each for key, each in call.items() if each is not None}
        made.append({"type": "function", **rest, "function": whole})
        check_json("tool_calls", made[-1])
    return made


def with_arguments(message: Message, as_text: bool) -> Message:
    """Return a message whose calls' arguments are all JSON text, or all objects."""
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        if as_text and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif not as_text and isinstance(arguments, str):
            arguments = json.loads(arguments)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _tools(value: object) -> tuple[dict[str, Any], ...]:
    value = from_json("field 'tools'", value) if says_something(value) else []
    if not isinstance(value, list):
        raise BadRow("field 'tools' should be a list of functions", f", it is {shortened(value)}")
    tools = []
    for tool in value:
        function = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
            raise BadRow("field 'tools' should be a list of functions", ", one has no name")
        check_json("tools", tool)
        tools.append({"type": "function", "function": tool} if function is tool else tool)
    return tuple(tools)


def _is_learned(message: Message) -> bool | None:
    """Return what the keys of a message say of learning it; None where they say nothing. Raises BadRow."""
    said: list[bool] = []
    for names, learned in ((LEARNED, True), (MASKED, False)):
        for name in names:
            value = message.get(name)
            if value is None:
                continue
            if not isinstance(value, bool | int | float) or value not in (0, 1):
                raise BadRow(
                    f"field '{name}' of a message should be 0 or 1", f", it is {shortened(value)}: it is learned or not"
                )
            said.append(bool(value) == learned)
    return all(said) if said else None


def _is_empty(message: Message) -> bool:
    return not message.get("content", "").strip() and "tool_calls" not in message


def _refuse_order(messages: tuple[Message, ...]) -> None:
    roles = [message["role"] for message in messages]
    for number, role in enumerate(roles):
        if role == "system" and number:
            raise BadRow("a message's role should be system in the first alone", f"; message {number + 1} is system")
        if role == "tool" and "assistant" not in roles[:number]:
            raise BadRow("a message's role should be tool after an answer alone", f"; message {number + 1} is tool")


def _remarks(talk: Conversation, asks_for_others: bool) -> Iterator[str]:
    roles = [message["role"] for message in talk.messages]
    answers = [flag for role, flag in zip(roles, talk.is_learned, strict=True) if role == "assistant"]
    if not all(answers):
        yield UNLEARNED
    if asks_for_others:
        yield _OTHERS
    if any(one == two != "tool" for one, two in itertools.pairwise(roles)):
        yield _IN_A_ROW
    if any(message["role"] == "user" and not message["content"].strip() for message in talk.messages):
        yield _EMPTY
    if talk.last < len(roles) - 1:
        yield _AFTER


__all__ = [
    "FORMAT",
    "ROLES",
    "UNLEARNED",
    "Conversation",
    "Message",
    "as_conversation",
    "read_conversation",
    "with_arguments",
    "with_system",
]
