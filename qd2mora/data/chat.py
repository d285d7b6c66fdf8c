"""The chat format: `messages` with roles, worded by a chat template; what the assistant says is learned, turn by turn.

A conversation becomes segments, given and learned in turn: the template is rendered up to each answer and with it, and
what the answer adds, the sign that ends the turn included, is learned. What follows the last answer is left out.
"""

import logging
from collections.abc import Mapping

from qd2mora.data.chat_template import ChatTemplate
from qd2mora.data.file_rows import BadRow
from qd2mora.data.row_format import Fields, RowFormat
from qd2mora.recipe import Data
from qd2mora.recipe.data import OWN

FORMAT = RowFormat(("messages",), None, texts=(), optional=("system",), inner=("role", "content"))
ROLES = ("system", "user", "assistant")
# Names of other collections of conversations for the same roles.
_SAME = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
_log = logging.getLogger(__name__)
_PROBE = "probe-of-an-answer"

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "plain": (
        "{{ bos_token }}{% for m in messages %}### {{ m.role | capitalize }}:\n{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else '' }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
    ),
}
"""Templates by name, for tokenizers that bring none."""


def check(messages: object, names: Mapping[str, str]) -> list[dict[str, str]]:
    """Return a conversation's roles and contents; `names`: what these two are called in it. Raises BadRow."""
    role_name, content_name = (names.get(name, name) for name in FORMAT.inner)
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise BadRow("'messages' should be a list of objects")
    found: list[dict[str, str]] = []
    for message in messages:
        role, content = message.get(role_name), message.get(content_name)
        if isinstance(role, str):
            role = _SAME.get(role, role)
        if role not in ROLES or (role == "system" and found):
            raise BadRow("a message's role should be user or assistant, the first may be system", f"; {_short(role)}")
        if not isinstance(content, str):
            raise BadRow("a message's content should be text", f", it is {_short(content)}")
        found.append({"role": role, "content": content})
    answers = [message["content"] for message in found if message["role"] == "assistant"]
    if not answers or not all(answer.strip() for answer in answers):
        raise BadRow("an assistant's message is missing or empty", ", there is nothing to learn")
    return found


def segments(messages: list[dict[str, str]], template: ChatTemplate) -> tuple[str, ...]:
    """Return the text of a conversation up to its last answer, cut: given, learned, given, learned, ...

    The end token closes an answer that the template leaves open. Raises BadRow.
    """
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    asked = template.render_each([messages[:turn] for turn in turns], asking=True)
    told = template.render_each([messages[: turn + 1] for turn in turns])
    parts: list[str] = []
    done = ""
    for turn, before, after in zip(turns, asked, told, strict=True):
        if not before.startswith(done) or not after.startswith(before):
            raise BadRow("the chat template rewrites earlier turns", ", so what is learned cannot be told")
        # The last word: a template may trim the answer, or leave out how it begins.
        last_word, answer = messages[turn]["content"].split()[-1], after[len(before) :]
        if answer.rstrip().endswith(last_word):  # the template leaves the turn open
            answer += template.end
        parts += [before[len(done) :], answer]
        done = after
    return tuple(parts)


def closing_sign(template: ChatTemplate) -> str:
    """Return what a template writes after an assistant's answer, white space aside; empty where it writes nothing."""
    talk = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _PROBE}]
    try:
        _before, found, after = template.render(talk).rpartition(_PROBE)
    except BadRow:
        return ""
    return after.strip() if found else ""


def named_templates(data: Data) -> tuple[str, ...]:
    """Return the templates of ours that word conversations of a recipe."""
    return tuple(TEMPLATES[name] for name in dict.fromkeys(task.wording for task in data.tasks) if name in TEMPLATES)


def template_to_keep(data: Data) -> str | None:
    """Return the template of ours that an export carries; None where the tokenizer's own is what was trained with."""
    chosen = list(dict.fromkeys(task.wording for task in data.tasks if task.wording in (OWN, *TEMPLATES)))
    if not chosen:
        return None
    kept = OWN if OWN in chosen else chosen[0]
    if len(chosen) > 1:
        _log.warning("tasks were worded by %s; the export's chat template is %s", " and ".join(chosen), kept)
    return TEMPLATES.get(kept)


def segments_of_instruction(row: Fields, template: ChatTemplate) -> tuple[str, ...]:
    """Return an instruction row as a conversation of one turn, cut as `segments` does. Raises BadRow."""
    asked = [row[name] for name in ("instruction", "input") if row.get(name)]
    turns = [{"role": "user", "content": "\n\n".join(asked)}, {"role": "assistant", "content": row["output"]}]
    return segments(with_system(turns, row.get("system")), template)


def with_system(messages: list[dict[str, str]], system: str | None) -> list[dict[str, str]]:
    """Return a conversation that begins with what the row's own field `system` says. Raises BadRow."""
    if not system:
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        raise BadRow("field 'system' and the first message are two system messages", ", and they differ")
    return messages


def _short(value: object) -> str:
    if isinstance(value, str | int | float | bool | None):
        return repr(value)[:40]
    return type(value).__name__


__all__ = [
    "FORMAT",
    "ROLES",
    "TEMPLATES",
    "check",
    "closing_sign",
    "named_templates",
    "segments",
    "segments_of_instruction",
    "template_to_keep",
    "with_system",
]
