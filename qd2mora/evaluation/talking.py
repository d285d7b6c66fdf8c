"""Talking with a model: one answer or a conversation, token by token as it is written.

How a message is worded: a run trained on conversations takes its task's chat template, any other run the instruction
template that it was trained on; a plain model takes its tokenizer's chat template where it brings one. Chat templates
are rendered in a child with limits, as in training. Generation is transformers' own, with its cache.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from qd2mora.data import chat as chat_format
from qd2mora.data.chat_template import ChatTemplate
from qd2mora.data.file_rows import BadRow
from qd2mora.data.instruction import split
from qd2mora.data.tokenise import special_tokens
from qd2mora.errors import InputRefused, nearest
from qd2mora.evaluation.subject import Subject, open_subject, until
from qd2mora.mixture import reads_first_pass

Write = Callable[[str], None]
INSTRUCTION, OWN = "instruction", "tokenizer"
FORGET = "/new"
_HALF_LETTER = "�"


@dataclass(frozen=True)
class TalkOptions:
    """How a model is talked with: what its routers are told of each message, how messages are worded, how it answers.

    task, vector: where the adapter reads them. template: instruction, tokenizer (its own chat template), chatml or
    plain; None as trained. The next token is the likeliest at temperature 0, else drawn among the likeliest tokens of
    the summed probability `top_p`; the same seed draws the same.
    """

    task: str | None = None
    vector: list[float] | None = None
    template: str | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        # Nearer to 0, logits divided by it are no float32 any more.
        if self.temperature != 0 and not 1e-3 <= self.temperature <= 1e3:
            raise InputRefused(
                f"--temperature: {self.temperature} will not do: 0 for the likeliest token, or 0.001 to 1000"
            )
        if not 0 < self.top_p <= 1:
            raise InputRefused(f"--top-p: {self.top_p} will not do: above 0, up to 1")
        if self.top_p < 1 and self.temperature == 0:
            raise InputRefused(f"--top-p: {self.top_p} draws nothing at temperature 0; give --temperature, such as 0.7")


def generate(
    model: str | Path,
    prompt: str,
    options: TalkOptions | None = None,
    *,
    raw: bool = False,
    write: Write | None = None,
    allow_changed: Collection[str] = (),
) -> str:
    """Answer an instruction or (`raw`) continue a text; `write` gets the text as it comes.

    Raises InputRefused, DamagedFile.
    """
    talk = open_talk(model, options or TalkOptions(), allow_changed)
    if raw:
        return talk.continue_text(prompt, write)
    with talk.worded():
        return talk.answer(prompt, write)


def chat(
    model: str | Path,
    lines: Iterable[str],
    write: Write,
    options: TalkOptions | None = None,
    *,
    allow_changed: Collection[str] = (),
) -> None:
    """Answer line after line, the conversation so far in mind where a chat template words it; `/new` forgets it.

    Raises InputRefused, DamagedFile.
    """
    talk = open_talk(model, options or TalkOptions(), allow_changed)
    with talk.worded():
        for line in lines:
            message = line.strip()
            if message == FORGET:
                talk.messages.clear()
            elif message:
                try:
                    talk.answer(message, write)
                except InputRefused as error:  # a conversation that outgrew the model need not end it
                    write(f"{error}; {FORGET} forgets what was said")
                write("\n")


def open_talk(model: str | Path, options: TalkOptions, allow_changed: Collection[str] = ()) -> "Talk":
    """Open a run, an export or a base for talking. Raises InputRefused, DamagedFile."""
    subject = open_subject(model, allow_changed)
    number = _task_number(subject, options.task)
    _check_vector(subject, options.vector)
    return Talk(subject, options, number)


@dataclass
class Talk:
    """A conversation with one model, and how it is worded."""

    subject: Subject
    options: TalkOptions
    task_number: int
    messages: list[dict[str, str]] = field(default_factory=list)
    _template: ChatTemplate | None = None

    @contextmanager
    def worded(self) -> Iterator[None]:
        """Word messages by the template asked for while the block runs. Raises InputRefused."""
        text = self._chat_template()
        if text is None:
            yield
            return
        with ChatTemplate(text, special_tokens(self.subject.tokenizer), "--template") as self._template:
            yield
        self._template = None

    def answer(self, message: str, write: Write | None = None) -> str:
        """Answer a message; both join the conversation. Raises InputRefused."""
        if self._template is None:
            return self.continue_text(split({"instruction": message, "output": ""})[0], write)
        self.messages.append({"role": "user", "content": message})
        try:
            text = self._template.render(self.messages, asking=True)
        except BadRow as error:
            raise InputRefused(f"{self._template.where}: {error}") from error
        try:
            said = self.continue_text(text, write, is_rendered=True)
        except InputRefused:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": said})
        return said

    def continue_text(self, text: str, write: Write | None = None, *, is_rendered: bool = False) -> str:
        """Continue a text; a rendered one brings its own start token. Returns what `write` was given."""
        tokenizer, plain = self.subject.tokenizer, self.subject.plain
        ids = torch.tensor([tokenizer(text, add_special_tokens=not is_rendered)["input_ids"]], device=plain.device)
        if not ids.numel():
            raise InputRefused("--prompt: there is no token to go on from")
        given, whole = ids.shape[1], int(plain.config.max_position_embeddings)
        if given >= whole:
            raise InputRefused(f"the prompt has {given} tokens, the model is made for {whole} with the answer")
        self.subject.route(self._row(ids.device))
        streamer = _Streamer(tokenizer, write or (lambda piece: None))
        with torch.no_grad(), torch.random.fork_rng(devices=[plain.device] if plain.device.type == "cuda" else []):
            torch.manual_seed(self.options.seed)
            out = plain.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self._settings(whole - given),
                streamer=streamer,
            )
        tokens = until(out[0, ids.shape[1] :].tolist(), tokenizer.eos_token_id)
        return streamer.finish(tokens)

    def _settings(self, room: int) -> GenerationConfig:
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=min(self.options.max_new_tokens, room),
            pad_token_id=self.subject.tokenizer.pad_token_id,
            eos_token_id=self.subject.tokenizer.eos_token_id,
            use_cache=not (self.subject.is_adapted and reads_first_pass(self.subject.model)),
        )
        if self.options.temperature > 0:
            # transformers would draw among the 50 likeliest; here top_p alone decides.
            settings.update(do_sample=True, temperature=self.options.temperature, top_p=self.options.top_p, top_k=0)
        return settings

    def _row(self, device: torch.device) -> dict[str, torch.Tensor]:
        row = {"task_index": torch.tensor([self.task_number], device=device)}
        if self.options.vector is not None:
            row["external"] = torch.tensor([self.options.vector], device=device)
        return row

    def _chat_template(self) -> str | None:
        """Return the text of a chat template, or None where the instruction template words messages."""
        template, task = self.options.template, self.options.task
        known = (INSTRUCTION, OWN, *chat_format.TEMPLATES)
        if template is not None and template not in known:
            raise InputRefused(f"--template: unknown '{template}'; {nearest(template, known)}")
        own, chosen = self.subject.tokenizer.chat_template, template
        if chosen is None and self.subject.run is not None:
            tasks = self.subject.run.recipe.data.tasks
            asked = [each for each in tasks if task in (None, each.name) and each.format == "chat"]
            chosen = INSTRUCTION
            if asked:
                chosen = asked[0].template
        if chosen is None:
            chosen = OWN if isinstance(own, str) else INSTRUCTION
        if chosen == INSTRUCTION:
            return None
        text = chat_format.TEMPLATES.get(chosen, own)
        if not isinstance(text, str):
            there = ", ".join(name for name in known if name != OWN)
            raise InputRefused(f"--template: the tokenizer has no chat template; there are {there}")
        return text


class _Streamer(BaseStreamer):
    """Hands on text as soon as no later token can change it: not half a letter, nor a word's space to come."""

    def __init__(self, tokenizer: Any, write: Write) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.tokens: list[int] = []
        self.is_prompt, self.shown = True, ""

    def put(self, value: torch.Tensor) -> None:
        if self.is_prompt:
            self.is_prompt = False
            return
        self.tokens += value.flatten().tolist()
        if self.tokens[-1] != self.tokenizer.eos_token_id:
            self._show(self._text(self.tokens))

    def end(self) -> None:
        """The rest is shown by `finish`, which knows where the answer ends."""

    def finish(self, tokens: list[int]) -> str:
        """Show what is left of the whole answer, and return it."""
        text = self._text(tokens)
        self.write(text[len(self.shown) :])
        return text

    def _text(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _show(self, text: str) -> None:
        if text.startswith(self.shown) and not text.endswith(_HALF_LETTER):
            self.write(text[len(self.shown) :])
            self.shown = text


def _task_number(subject: Subject, task: str | None) -> int:
    if subject.run is None:
        if task is not None:
            raise InputRefused("--task: this is no run, nothing here routes by task")
        return 0
    names = [each.name for each in subject.run.recipe.data.tasks]
    if task is not None and task not in names:
        raise InputRefused(f"--task: no task '{task}' in this run; there are {', '.join(names)}")
    if task is None and subject.run.routers.reads_task and len(names) > 1:
        raise InputRefused(f"--task: this adapter routes by task; name one of {', '.join(names)}")
    if task is None:
        return 0
    return names.index(task)


def _check_vector(subject: Subject, vector: list[float] | None) -> None:
    """Refuse a vector that is missing, one too many, or of another length than the adapter reads."""
    width = subject.run.vector_width if subject.run else None
    if width is None:
        if vector is not None:
            raise InputRefused("--vector: this model reads none")
        return
    if vector is None or len(vector) != width:
        given = "none" if vector is None else f"{len(vector)} numbers"
        raise InputRefused(f"--vector: this adapter reads {width} numbers of each row, {given} given")


__all__ = ["Talk", "TalkOptions", "chat", "generate", "open_talk"]
