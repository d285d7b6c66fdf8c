"""Talking with a model: one answer or a conversation, token by token as it is written.

A run is asked as it was trained; see `wording`. Messages become tokens in `prompting`, tokens an answer in `decoding`,
as for servers and files of prompts, so that all of them answer alike.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from qd2mora.errors import InputRefused
from qd2mora.evaluation.asked_spans import NOTHING_MARKED, AskedSpans, asked_spans
from qd2mora.evaluation.decoding import Wanted, check_temperature
from qd2mora.evaluation.prompting import Prompting, tokens_of_text
from qd2mora.evaluation.subject import SPANS_ARE_MISSING, Subject
from qd2mora.evaluation.votes import Vote
from qd2mora.evaluation.ways import Way, open_in_way
from qd2mora.evaluation.wording import Wording
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
        check_temperature(self.temperature)
        if not 0 < self.top_p <= 1:
            raise InputRefused(f"--top-p: {self.top_p} will not do: above 0, up to 1")
        if self.top_p < 1 and self.temperature == 0:
            raise InputRefused(f"--top-p: {self.top_p} draws nothing at temperature 0; give --temperature, such as 0.7")

    def wanted(self, subject: Subject, ids: list[int]) -> Wanted:
        """Return what a text wants that goes on from these tokens; they leave room for one more at least.

        Raises InputRefused where the subject does not know the task, or reads another vector.
        """
        check_vector(subject, self.vector)
        room = int(subject.plain.config.max_position_embeddings) - len(ids)
        way = self.way or Way()
        return Wanted(
            ids,
            subject.ends,
            min(self.max_new_tokens, room),
            temperature=way.temperature or self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            task=task_number(subject, self.task),
            vector=None if self.vector is None else tuple(self.vector),
        )


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

    Raises InputRefused, DamagedFile, NotFinite.
    """
    write, say = write or _nowhere, say or _nowhere
    subject, options = _opened(model, options or TalkOptions(), allow_changed)
    spans = _asked_spans(subject, options, prompt, say)
    prompt = spans.signed(prompt)
    if raw:
        say(Wording(AS_IT_IS, None, "--raw").line)
        text, vote = _written(subject, options, _wanted(subject, options, spans, prompt), write)
    else:
        with Prompting(subject, options.template, options.task, is_conversation=False) as prompting:
            say(prompting.line)
            worded, is_rendered = prompting.worded([{"role": "user", "content": prompt}])
            wanted = _wanted(prompting.subject, options, spans, worded, is_rendered=is_rendered)
            text, vote = _written(prompting.subject, options, wanted, write)
    if vote is not None:
        say(vote.line)
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

    Raises InputRefused, DamagedFile, NotFinite.
    """
    subject, options = _opened(model, options or TalkOptions(), allow_changed)
    if subject.reads_spans:
        raise InputRefused(SPANS_ARE_MISSING)
    messages: list[dict[str, str]] = []
    with Prompting(subject, options.template, options.task) as prompting:
        (say or _nowhere)(prompting.line)
        for line in lines:
            message = line.strip()
            if message == FORGET:
                messages.clear()
            elif message:
                messages.append({"role": "user", "content": message})
                try:
                    wanted = options.wanted(prompting.subject, prompting.of_messages(messages))
                    text, _ = _written(prompting.subject, options, wanted, write)
                    messages.append({"role": "assistant", "content": text})
                except InputRefused as error:  # a conversation that outgrew the model need not end it
                    messages.pop()
                    write(f"{error}; {FORGET} forgets what was said")
                write("\n")


def _opened(model: str | Path, options: TalkOptions, allow_changed: Collection[str]) -> tuple[Subject, TalkOptions]:
    """Open a run, an export or a base, and what answers beside it. Raises InputRefused, DamagedFile."""
    subject, way = open_in_way(model, options.way, allow_changed)
    # Before a wording is said: what will not do is one line, and nothing else.
    task_number(subject, options.task)
    check_vector(subject, options.vector)
    return subject, replace(options, way=way)


def _asked_spans(subject: Subject, options: TalkOptions, prompt: str, say: Write) -> AskedSpans:
    """Return the spans of a prompt; none where the adapter reads none. Raises InputRefused."""
    spans = asked_spans(subject, options.spans, prompt)
    if spans is None:
        return AskedSpans()
    if options.way is not None:
        raise InputRefused("--span: goes with one voice alone; --contrast, --ensemble and --samples tell none")
    if spans == AskedSpans():
        say(NOTHING_MARKED)
    return spans


def _wanted(
    subject: Subject, options: TalkOptions, spans: AskedSpans, signed: str, *, is_rendered: bool = False
) -> Wanted:
    """Return what is wanted of a worded text with signs around its spans. Raises InputRefused."""
    text, places = spans.taken_out(signed)
    ids = tokens_of_text(subject, text, is_rendered=is_rendered)
    return spans.told(subject, text, options.wanted(subject, ids), places)


def _written(subject: Subject, options: TalkOptions, wanted: Wanted, write: Write) -> tuple[str, Vote | None]:
    """Go on from tokens; return the text, and where samples were drawn what they said."""
    way = options.way or Way()
    if way.samples > 1:
        (vote,) = way.votes(subject, [wanted], way.answer_of)
        write(vote.text)
        return vote.text, vote
    # A batch of one: what a server and a file of prompts run, so that a seed draws the same text everywhere.
    decoding = way.decoding(subject, [wanted])
    with subject.writing():
        while not decoding.is_done:
            decoding.step()
            write(decoding.answers[0].news())
    return decoding.answers[0].text, None


def _nowhere(text: str) -> None:
    """Tell nobody."""


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


__all__ = ["TalkOptions", "chat", "check_vector", "generate", "task_number"]
