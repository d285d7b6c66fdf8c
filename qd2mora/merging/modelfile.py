"""The Modelfile beside a GGUF file: with it `ollama create NAME -f Modelfile` words messages as the run was trained.

Ollama words conversations by a Go template. A chat template of the usual kind writes something before the first
message, between two, and before the answer, and each of these depends on the roles around it alone; so a few probes
show all of it, and whether it is so is checked on more conversations. One that trims what people write, or words tools
and reasoning, does more than that: a comment says what is not carried over. Consecutive messages of one role are one
there (Ollama 0.11, `template.collate`).
"""

from dataclasses import dataclass, replace

from transformers import GenerationConfig, PreTrainedTokenizerBase

from qd2mora.base.gguf_forms import context_length
from qd2mora.data.chat import closing_sign
from qd2mora.data.chat_template import ChatTemplate, reads_clock
from qd2mora.data.file_rows import BadRow
from qd2mora.data.instruction import split
from qd2mora.data.tokenise import special_tokens
from qd2mora.errors import InputRefused
from qd2mora.recipe.data import AS_IT_IS, INSTRUCTION
from qd2mora.run_folder import OpenRun

NAME = "Modelfile"
_LONGEST_CONTEXT = 8192
"""Ollama keeps room for the whole context: of a model of 131,072 tokens that is more than many machines have."""
_WORDS = {"system": "PROBES", "user": "PROBEU", "assistant": "PROBEA"}
_TALKS = ("u", "uau", "uauau", "su", "suau", "suauau")
_ROLES = {"s": "system", "u": "user", "a": "assistant"}


@dataclass(frozen=True)
class Gaps:
    """What a template writes around messages: before the first, between two, and before the answer.

    `after_system`, `before_system` are None where a template has no place for a system message.
    """

    first: str
    to_answer: str
    to_user: str
    asking: str
    before_system: str | None = None
    after_system: str | None = None
    closing: str = ""
    """What ends an answer, white space aside."""

    def texts(self, roles: str) -> list[str]:
        """Return what stands before each message of a conversation (`suau`), and before the answer."""
        found = []
        for place, role in enumerate(roles):
            if role == "s":
                found.append(self.before_system or "")
            elif role == "a":
                found.append(self.to_answer)
            elif place == 0 or (self.after_system is None and roles[place - 1] == "s"):
                found.append(self.first)
            else:
                found.append(self.to_user if roles[place - 1] == "a" else self.after_system or "")
        return [*found, self.asking]


def modelfile_of(opened: OpenRun, file: str) -> str:
    """Return the Modelfile of a whole model."""
    return f"FROM ./{file}\n{_rest(opened)}"


def adapter_modelfile_of(opened: OpenRun, file: str) -> str:
    """Return the Modelfile of a LoRA; which file of the base it goes on, only its user knows."""
    model = opened.recipe.base.model
    lines = [
        f"# The base that was trained on is {model}: put the path of a GGUF file of it here.",
        "FROM ./base.gguf",
        f"ADAPTER ./{file}",
    ]
    return "\n".join(lines) + "\n" + _rest(opened)


def _rest(opened: OpenRun) -> str:
    stops, lines = _stops(opened), list[str]()
    wordings = {task.wording for task in opened.recipe.data.tasks}
    if wordings == {INSTRUCTION}:
        before, after = split({"instruction": _WORDS["user"], "output": ""})[0].split(_WORDS["user"])
        lines.append("# Each message is an instruction of its own, as in training: what was said before is not read.")
        lines.append(f'TEMPLATE """{go_of_instruction(before, after)}"""')
    elif wordings == {AS_IT_IS}:
        lines += ["# Trained on texts as they are: a message is continued.", 'TEMPLATE """{{ .Prompt }}"""']
    else:
        if len(wordings) > 1:
            lines.append(f"# Trained with several wordings, {', '.join(sorted(wordings))}; this is one of them.")
        try:
            gaps = gaps_of(opened.tokenizer, opened.clock)
        except InputRefused as error:
            lines.append(f"# No TEMPLATE: {' '.join(str(error).split())}")
        else:
            lines += conversation_lines(gaps, opened.tokenizer)
            stops += [gaps.closing] if gaps.closing else []
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops) if '"' not in stop and "\n" not in stop]
    lines.append(f"PARAMETER num_ctx {min(context_length(opened.model.config), _LONGEST_CONTEXT)}")
    lines += ["# The likeliest token, as `qd2mora generate` and its scores take it.", "PARAMETER temperature 0"]
    return "\n".join(lines) + "\n"


def conversation_lines(gaps: Gaps, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the lines that word a conversation as a chat template does, and say what is not carried over."""
    lines = ["# Checked against the chat template. Not carried over: tools, and the trimming of white space."]
    if gaps.after_system is None:
        lines.append("# The chat template has no place for a system message: it is left out.")
    if reads_clock(str(tokenizer.chat_template)):
        lines.append("# The chat template writes the date; here it stays as it was when this file was made.")
    start = tokenizer.bos_token
    if isinstance(start, str) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        # llama.cpp puts it before every text itself.
        if not gaps.first.startswith(start):
            lines.append(f"# llama.cpp begins every text with {start}, which the chat template did not in training.")
        system = gaps.before_system
        system = None if system is None else system.removeprefix(start)
        gaps = replace(gaps, first=gaps.first.removeprefix(start), before_system=system)
    return [*lines, f'TEMPLATE """{go_of_gaps(gaps)}"""']


def gaps_of(tokenizer: PreTrainedTokenizerBase, clock: str | None = None) -> Gaps:
    """Return what a tokenizer's chat template writes around messages. Raises InputRefused where it is not so simple."""
    if not isinstance(tokenizer.chat_template, str):
        raise InputRefused("the tokenizer has no chat template")
    with ChatTemplate(tokenizer.chat_template, special_tokens(tokenizer), "the tokenizer", clock) as template:
        seen = {roles: _gaps_in(template, roles) for roles in _TALKS}
        closing = closing_sign(template)
    if seen["u"] is None or seen["uau"] is None:
        raise InputRefused("the chat template words no plain conversation of user and assistant")
    first, asking = seen["u"]
    _, to_answer, to_user, _ = seen["uau"]
    gaps = Gaps(first, to_answer, to_user, asking, closing=closing)
    if seen["su"] is not None:
        gaps = replace(gaps, before_system=seen["su"][0], after_system=seen["su"][1])
    for roles, found in seen.items():
        has_place = "s" not in roles or gaps.after_system is not None
        if has_place and found != gaps.texts(roles):
            raise InputRefused("the chat template words a message by more than the roles beside it")
    return gaps


def _gaps_in(template: ChatTemplate, roles: str) -> list[str] | None:
    """Return what stands around the messages of a probe; None where the template refuses it or drops a message."""
    messages = _probe(roles)
    try:
        text = template.render(messages, asking=True)
    except BadRow:
        return None
    found = []
    for message in messages:
        before, word, text = text.partition(message["content"])
        if not word:
            return None
        found.append(before)
    return [*found, text]


def _probe(roles: str) -> list[dict[str, str]]:
    kinds = [_ROLES[role] for role in roles]
    return [{"role": kind, "content": f"{_WORDS[kind]}{place}"} for place, kind in enumerate(kinds)]


def go_of_gaps(gaps: Gaps) -> str:
    """Return the Go template of a conversation."""
    first, answer, user, asking = map(_literal, (gaps.first, gaps.to_answer, gaps.to_user, gaps.asking))
    after_system, system = f"{{{{ else if eq $i 1 }}}}{first}", ""
    if gaps.before_system is not None and gaps.after_system is not None:
        system = f'{{{{ if eq $m.Role "system" }}}}{_literal(gaps.before_system)}{{{{ $m.Content }}}}{{{{ end }}}}'
        after_system = f"{{{{ else if eq $i 1 }}}}{_literal(gaps.after_system)}"
    return (
        "{{ range $i, $m := .Messages }}"
        + system
        + '{{ if eq $m.Role "user" }}'
        + f"{{{{ if eq $i 0 }}}}{first}{after_system}{{{{ else }}}}{user}{{{{ end }}}}{{{{ $m.Content }}}}"
        + f"{{{{ if eq (len (slice $.Messages $i)) 1 }}}}{asking}{{{{ end }}}}{{{{ end }}}}"
        + f'{{{{ if eq $m.Role "assistant" }}}}{answer}{{{{ $m.Content }}}}{{{{ end }}}}'
        + "{{ end }}"
    )


def go_of_instruction(before: str, after: str) -> str:
    """Return the Go template that words the last message alone."""
    return (
        '{{ range $i, $m := .Messages }}{{ if and (eq $m.Role "user") (eq (len (slice $.Messages $i)) 1) }}'
        + f"{_literal(before)}{{{{ $m.Content }}}}{_literal(after)}{{{{ end }}}}{{{{ end }}}}"
    )


def _literal(text: str) -> str:
    """Return text as a Go template in a Modelfile's triple quotes writes it."""
    for mark, escaped in (("{{", '{{ "{" }}{{ "{" }}'), ('"""', '{{ "\\"\\"\\"" }}')):
        text = escaped.join(text.split(mark))
    return text


def _stops(opened: OpenRun) -> list[str]:
    """Return the texts of the tokens that end an answer."""
    generation = opened.model.get_base_model().generation_config
    listed = generation.eos_token_id if isinstance(generation, GenerationConfig) else None
    ids = [opened.tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
    return [str(opened.tokenizer.convert_ids_to_tokens(number)) for number in ids if isinstance(number, int)]


__all__ = ["NAME", "adapter_modelfile_of", "conversation_lines", "gaps_of", "go_of_instruction", "modelfile_of"]
