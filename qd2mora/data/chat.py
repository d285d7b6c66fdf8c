"""The chat templates of ours by name, and what is asked of any template: how it ends an answer, which one to keep."""

import logging

from qd2mora.data.chat_template import ChatTemplate
from qd2mora.data.file_rows import BadRow
from qd2mora.recipe import Data
from qd2mora.recipe.data import OWN

_log = logging.getLogger(__name__)
_PROBE = "probe-of-an-answer"

# Tools, their calls and reasoning as Qwen and Hermes write them, which many programs read.
_TOOLS = (
    "Tools, one a line. A call is <tool_call>, a JSON object with name and arguments, </tool_call>.\n"
    "{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}"
)
_ANSWER = (
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls %}{{ '\n' if m.content or loop.index0 }}"
    "<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
)
TEMPLATES = {
    "chatml": (
        "{% if tools %}<|im_start|>system\n"
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
        + _TOOLS
        + "<|im_end|>\n{% endif %}"
        "{% for m in messages %}{% if not (tools and loop.first and m.role == 'system') %}"
        "<|im_start|>{{ m.role }}\n" + _ANSWER + "<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "plain": (
        "{{ bos_token }}{% if tools %}### Tools:\n" + _TOOLS + "{{ '\n' }}{% endif %}"
        "{% for m in messages %}### {{ m.role | capitalize }}:\n"
        + _ANSWER
        + "{{ eos_token if m.role == 'assistant' else '' }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
    ),
}
"""Templates by name, for tokenizers that bring none."""


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


__all__ = ["TEMPLATES", "closing_sign", "named_templates", "template_to_keep"]
