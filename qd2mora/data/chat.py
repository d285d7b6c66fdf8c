"""The chat format: `messages` with roles, worded by the tokenizer's own chat template; assistants' turns are learned.

A conversation becomes segments, given and learned in turn. The template is rendered up to each answer and with it: what
the answer adds, the sign that ends the turn included, is what is learned.
"""

from typing import Any

from qd2mora.data.rows import BadRow
from qd2mora.data.template import ChatTemplate

FIELDS = ("messages",)
ROLES = ("system", "user", "assistant")


def check(messages: Any) -> list[dict[str, str]]:
    """Return a conversation's messages, role and content alone. Raises BadRow."""
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise BadRow("'messages' should be a list of objects")
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or (role == "system" and number > 0):
            raise BadRow("a message's role should be user or assistant, the first may be system")
        if not isinstance(content, str):
            raise BadRow("a message's content should be text")
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers or not all(answer.strip() for answer in answers):
        raise BadRow("an assistant's message is missing or empty", ", there is nothing to learn")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def segments(messages: list[dict[str, str]], template: ChatTemplate, end: str) -> tuple[str, ...]:
    """Return the text of a conversation up to its last answer, cut: given, learned, given, learned, ...

    `end` closes an answer where the template itself does not. Raises BadRow.
    """
    parts: list[str] = []
    done = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.render(messages[:number], asking=True)
        after = template.render(messages[: number + 1])
        if not before.startswith(done) or not after.startswith(before):
            raise BadRow("the chat template rewrites earlier turns", ", so what is learned cannot be told")
        answer = after[len(before) :]
        closed = not answer.rstrip().endswith(message["content"].rstrip())
        parts += [before[len(done) :], answer if closed else answer + end]
        done = after
    return tuple(parts)


__all__ = ["FIELDS", "ROLES", "check", "segments"]
