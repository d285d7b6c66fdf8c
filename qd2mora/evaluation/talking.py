"""Talking with a model: one answer or a conversation, token by token as it is written.

A run is asked as it was trained; see `wording`. Chat templates are rendered in a child with limits, as in training.
Generation is transformers' own, with its cache.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from qd2mora.base.passes import device_of
from qd2mora.data.chat_template import ChatTemplate
from qd2mora.data.file_rows import BadRow
from qd2mora.data.instruction import split
from qd2mora.data.tokenise import special_tokens
from qd2mora.errors import InputRefused
from qd2mora.evaluation.asked_spans import NOTHING_MARKED, AskedSpans, asked_spans, taken_out
from qd2mora.evaluation.decoding import Wanted
from qd2mora.evaluation.ends import HALF_LETTER, Ends
from qd2mora.evaluation.next_token import RefuseNotFinite
from qd2mora.evaluation.subject import SPANS_ARE_MISSING, Subject
from qd2mora.evaluation.votes import Vote
from qd2mora.evaluation.ways import Way, open_in_way
from qd2mora.evaluation.wording import Wording, wording_of
from qd2mora.mixture import forgoes_cache
from qd2mora.recipe.data import AS_IT_IS

Write = Callable[[str], None]
FORGET = "/new"


@dataclass(frozen=True)
class TalkOptions:
    """How a model is talked with: what its routers are told of each message, how messages are worded, how it answers.

    task, vector: where the adapter reads them; a message is worded as the task was trained. template: instruction,
    tokenizer (its own chat template), chatml or plain; None as trained. The next token is the likeliest at temperature
    0, else drawn among the likeliest tokens of the summed probability `top_p`; the same seed draws the same.
    """

    task: str | None = None
    vector: list[float] | None = None
    template: str | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    spans: tuple[str, ...] = ()
    """Spans of the prompt, as they are typed, where the adapter reads them."""
    way: Way | None = None
    """How it writes, where not alone and once; drawn as said here."""

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
    say: Write | None = None,
    allow_changed: Collection[str] = (),
) -> str:
    """Answer an instruction or (`raw`) continue a text; `write` gets the text as it comes, `say` how it is worded.

    Raises InputRefused, DamagedFile.
    """
    talk = open_talk(model, options or TalkOptions(), allow_changed)
    prompt = talk.marked(prompt, say)
    if raw:
        if say is not None:
            say(Wording(AS_IT_IS, None, "--raw").line)
        text = talk.continue_text(prompt, write)
    else:
        with talk.worded(say):
            text = talk.answer(prompt, write)
    if talk.vote is not None and say is not None:
        say(talk.vote.line)
    return text


def chat(
    model: str | Path,
    lines: Iterable[str],
    write: Write,
    options: TalkOptions | None = None,
    *,
    say: Write | None = None,
    allow_changed: Collection[str] = (),
) -> None:
    """Answer line after line, the conversation so far in mind where a chat template words it; `/new` forgets it.

    Raises InputRefused, DamagedFile.
    """
    talk = open_talk(model, options or TalkOptions(), allow_changed)
    if talk.subject.reads_spans:
        raise InputRefused(SPANS_ARE_MISSING)
    with talk.worded(say, is_conversation=True):
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
    subject, way = open_in_way(model, options.way, allow_changed)
    options = replace(options, way=way)
    number = task_number(subject, options.task)
    check_vector(subject, options.vector)
    return Talk(subject, options, number)


@dataclass
class Talk:
    """A conversation with one model, and how it is worded."""

    subject: Subject
    options: TalkOptions
    task_number: int
    messages: list[dict[str, str]] = field(default_factory=list)
    vote: Vote | None = None
    """What samples of the last answer said, where several were drawn."""
    _wording: Wording | None = None
    _template: ChatTemplate | None = None
    _spans: AskedSpans | None = None

    def marked(self, prompt: str, say: Write | None = None) -> str:
        """Return a prompt with signs around its spans, which end with its wording. Raises InputRefused."""
        self._spans = asked_spans(self.subject, self.options.spans, prompt)
        if self._spans is None:
            return prompt
        if self.options.way is not None:
            raise InputRefused("--span: goes with one voice alone; --contrast, --ensemble and --samples tell none")
        if say is not None and self._spans == AskedSpans():
            say(NOTHING_MARKED)
        return self._spans.signed(prompt)

    @contextmanager
    def worded(self, say: Write | None = None, *, is_conversation: bool = False) -> Iterator[None]:
        """Word messages as trained or asked for while the block runs; `say` is told how. Raises InputRefused."""
        options = self.options
        wording = wording_of(self.subject, options.template, options.task, is_conversation=is_conversation)
        if say is not None:
            say(wording.line)
        self._wording = wording
        if wording.template is None:
            yield
            return
        if wording.template not in self.subject.templates:  # its sign ends an answer too
            self.subject = replace(self.subject, templates=(*self.subject.templates, wording.template))
        with ChatTemplate(wording.template, special_tokens(self.subject.tokenizer), "--template") as self._template:
            yield
        self._template = None

    def answer(self, message: str, write: Write | None = None) -> str:
        """Answer a message; both join the conversation. Raises InputRefused."""
        assert self._wording is not None
        if self._wording.name == AS_IT_IS:
            return self.continue_text(message, write)
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
        device, places = device_of(plain), dict[int, tuple[int, int]]()
        if self._spans is not None:
            text, places = taken_out(text)
        ids = torch.tensor([tokenizer(text, add_special_tokens=not is_rendered)["input_ids"]], device=device)
        if not ids.numel():
            raise InputRefused("--prompt: there is no token to go on from")
        self.subject.check_ids(ids)
        given, whole = ids.shape[1], int(plain.config.max_position_embeddings)
        if given >= whole:
            raise InputRefused(f"the prompt has {given} tokens, the model is made for {whole} with the answer")
        if self.options.way is not None:
            return self._in_way(ids[0].tolist(), self.options.way, whole - given, write or (lambda piece: None))
        told = self._row(device)
        if self._spans is not None:
            told |= self._spans.told(self.subject, text, ids[0].tolist(), places)
        self.subject.route(told)
        cards = [device] if device.type == "cuda" else []
        streamer = _Streamer(tokenizer, write or (lambda piece: None), self.subject.ends)
        with torch.no_grad(), self.subject.writing(), torch.random.fork_rng(devices=cards):
            torch.manual_seed(self.options.seed)
            out = plain.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self._settings(whole - given),
                streamer=streamer,
                stopping_criteria=self.subject.ends.criteria(tokenizer, given),
                logits_processor=[RefuseNotFinite()],
            )
        return streamer.finish(self.subject.ends.before(out[0, given:].tolist()))

    def _in_way(self, ids: list[int], way: Way, room: int, write: Write) -> str:
        options, vector = self.options, self.options.vector
        wanted = Wanted(
            ids,
            self.subject.ends,
            min(options.max_new_tokens, room),
            temperature=way.temperature or options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            task=self.task_number,
            vector=None if vector is None else tuple(vector),
        )
        if way.samples > 1:
            (self.vote,) = way.votes(self.subject, [wanted], way.answer_of)
            write(self.vote.text)
            return self.vote.text
        decoding = way.decoding(self.subject, [wanted])
        with self.subject.writing():
            while not decoding.is_done:
                decoding.step()
                write(decoding.answers[0].news())
        return decoding.answers[0].text

    def _settings(self, room: int) -> GenerationConfig:
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=min(self.options.max_new_tokens, room),
            pad_token_id=self.subject.tokenizer.pad_token_id,
            eos_token_id=list(self.subject.ends.ids),
            use_cache=not (self.subject.is_adapted and forgoes_cache(self.subject.model)),
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


class _Streamer(BaseStreamer):
    """Hands on text as soon as no later token can change it: no half letter, no word's space to come, no begun end."""

    def __init__(self, tokenizer: Any, write: Write, ends: Ends) -> None:
        self.tokenizer, self.write, self.ends = tokenizer, write, ends
        self.tokens: list[int] = []
        self.is_prompt, self.shown = True, ""

    def put(self, value: torch.Tensor) -> None:
        if self.is_prompt:
            self.is_prompt = False
            return
        self.tokens += value.flatten().tolist()
        if self.tokens[-1] not in self.ends.ids:
            self._show(self.ends.settled(self._text(self.tokens)))

    def end(self) -> None:
        """The rest is shown by `finish`, which knows where the answer ends."""

    def finish(self, tokens: list[int]) -> str:
        """Show what is left of the whole answer, and return it."""
        text = self.ends.cut(self._text(tokens))
        self.write(text[len(self.shown) :])
        return text

    def _text(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _show(self, text: str) -> None:
        if text.startswith(self.shown) and not text.endswith(HALF_LETTER):
            self.write(text[len(self.shown) :])
            self.shown = text


def task_number(subject: Subject, task: str | None) -> int:
    """Return the number of a task that is asked for by name. Raises InputRefused."""
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


def check_vector(subject: Subject, vector: list[float] | None) -> None:
    """Refuse a vector that is missing, one too many, or of another length than the adapter reads."""
    width = subject.run.vector_width if subject.run else None
    if width is None:
        if vector is not None:
            raise InputRefused("--vector: this model reads none")
        return
    if vector is None or len(vector) != width:
        given = "none" if vector is None else f"{len(vector)} numbers"
        raise InputRefused(f"--vector: this adapter reads {width} numbers of each row, {given} given")


__all__ = ["Talk", "TalkOptions", "chat", "check_vector", "generate", "open_talk", "task_number"]
