"""A file of prompts to a file of answers: batched, each row as if it were alone, and gone on with after a kill.

A row of the prompts (JSON lines) has `prompt`, a text, or `messages`, each with `role` and `content`; `task` and
`vector` where routers read them. A row of the answers is its number, its answer, and why it ended: `stop` or `length`;
of samples that voted it is `vote`, with how many agree and whether another answer had as many.
What is done stands in `OUT.part`, under a line that says what was asked; OUT appears when all is there.
"""

import json
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from qd2mora.disk.durable import write_bytes_atomically
from qd2mora.disk.file_hash import hash_of_file
from qd2mora.disk.lock import lock_beside, locked
from qd2mora.errors import InputRefused
from qd2mora.evaluation.answer_lines import AnswerLines
from qd2mora.evaluation.decoding import Wanted
from qd2mora.evaluation.prompting import Prompting
from qd2mora.evaluation.subject import SPANS_ARE_MISSING, Subject, model_mark
from qd2mora.evaluation.talking import TalkOptions, Write, check_vector, task_number
from qd2mora.evaluation.ways import Way, open_in_way
from qd2mora.safekeeping.places import check_place
from qd2mora.terminal.pace import showing

MAX_LINE_BYTES = 8 << 20
ROLES = ("system", "user", "assistant")
_FIELDS = ("prompt", "messages", "task", "vector", "id")


@dataclass(frozen=True)
class Asked:
    """One row of a file of prompts."""

    number: int
    prompt: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    task: str | None = None
    vector: list[float] | None = None
    id: str | int | None = None


@dataclass(frozen=True)
class ManyOptions:
    """How a file is answered: as `talk` says, each row worded or (`raw`) continued, so many at once."""

    talk: TalkOptions
    raw: bool = False
    rows_at_once: int = 16


def generate_file(
    model: str | Path,
    prompts: Path,
    out: Path,
    how: ManyOptions,
    *,
    say: Write | None = None,
    allow_changed: Collection[str] = (),
) -> int:
    """Answer every row of a file; return how many there are. Raises InputRefused, before anything is written."""
    check_place(out, "--out")
    if out.is_dir() or out.exists():
        raise InputRefused(f"--out: '{out}' is there already; name a new file, or remove that one")
    if not out.parent.is_dir():
        raise InputRefused(f"--out: there is no folder '{out.parent}'")
    rows, options, raw = read_prompts(prompts), how.talk, how.raw
    with locked(lock_beside(out), "--out", out), ExitStack() as stack:
        subject, way = open_in_way(model, options.way, allow_changed)
        if subject.reads_spans:
            raise InputRefused(SPANS_ARE_MISSING)
        # Every row is worded before the first is answered: a bad one is told while nothing is spent.
        wanted = _worded(_Words(subject, options, raw, stack, say), rows, prompts)
        asked = {"prompts": hash_of_file(prompts), "model": model_mark(model), "raw": raw, **asdict(options)}
        del asked["way"], asked["spans"]  # as answers from before there were ways have it; spans are refused
        if options.way is not None:
            asked["way"] = options.way.question
        part = out.with_name(out.name + ".part")
        done = AnswerLines(part, asked)
        _answer(subject, rows, wanted, done, replace(how, talk=replace(options, way=way)))
        # In the order of the prompts, whatever the order in which they were answered.
        lines = [done.of(row.number) for row in rows]
        write_bytes_atomically(out, b"".join(lines))
        part.unlink()
    return len(rows)


@dataclass
class _Words:
    """Words rows, by the wording of each task that is asked for; says once how."""

    subject: Subject
    options: TalkOptions
    raw: bool
    stack: ExitStack
    say: Write | None = None
    wordings: dict[tuple[str | None, bool], Prompting] = field(default_factory=dict)

    def of(self, row: Asked) -> Wanted:
        """Return what a row wants. Raises InputRefused."""
        own = replace(self.options, task=row.task or self.options.task, vector=row.vector or self.options.vector)
        task_number(self.subject, own.task)
        check_vector(self.subject, own.vector)
        wording = self._wording(own.task, is_conversation=bool(row.messages))
        if self.raw and row.prompt is None:
            raise InputRefused("'messages' does not go with --raw; give 'prompt'")
        if self.raw:
            ids = wording.of_text(row.prompt or "")
        else:
            ids = wording.of_messages(row.messages or [{"role": "user", "content": row.prompt or ""}])
        return own.wanted(wording.subject, ids)

    def _wording(self, task: str | None, *, is_conversation: bool) -> Prompting:
        key = task, is_conversation
        if key not in self.wordings:
            prompting = Prompting(self.subject, self.options.template, task, is_conversation=is_conversation)
            self.wordings[key] = self.stack.enter_context(prompting)
            if self.say is not None and not self.raw:
                self.say(prompting.line)
        return self.wordings[key]


def _worded(words: _Words, rows: list[Asked], prompts: Path) -> dict[int, Wanted]:
    """Return what each row wants, all of them checked. Raises InputRefused naming the first that will not do."""
    wanted = {}
    for row in rows:
        try:
            wanted[row.number] = words.of(row)
        except InputRefused as error:
            raise InputRefused(f"{prompts}: row {row.number}: {error}") from error
    return wanted


def _answer(
    subject: Subject, rows: list[Asked], wanted: Mapping[int, Wanted], done: AnswerLines, how: ManyOptions
) -> None:
    """Answer what is not done yet, rows of similar length together, the longest first: what does not fit shows soon."""
    left = [row for row in rows if row.number not in done]
    left.sort(key=lambda row: -len(wanted[row.number].ids))
    with subject.writing(), showing("answering, rows", len(rows)) as advance:
        advance(len(rows) - len(left))
        for start in range(0, len(left), how.rows_at_once):
            batch = left[start : start + how.rows_at_once]
            done.add(_answered(subject, batch, [wanted[row.number] for row in batch], how.talk.way or Way()))
            advance(len(batch))


def _answered(subject: Subject, batch: list[Asked], wanted: list[Wanted], way: Way) -> list[dict[str, object]]:
    """Return the lines of a batch; of samples, how many agree and whether they are tied."""
    if way.samples > 1:
        votes = way.votes(subject, wanted, way.answer_of)
        lines = (_line(row, vote.text, "vote") for row, vote in zip(batch, votes, strict=True))
        told = ({"agree": vote.count, "samples": vote.samples, "tied": vote.is_tied} for vote in votes)
        return [line | more for line, more in zip(lines, told, strict=True)]
    decoding = way.decoding(subject, wanted)
    while not decoding.is_done:
        decoding.step()
    return [_line(row, answer.text, answer.finish) for row, answer in zip(batch, decoding.answers, strict=True)]


def _line(row: Asked, text: str, finish: str | None) -> dict[str, object]:
    named = {} if row.id is None else {"id": row.id}
    return {"row": row.number, **named, "answer": text, "finish": finish}


def read_prompts(path: Path) -> list[Asked]:
    """Read a file of prompts, every row of it. Raises InputRefused naming the first that will not do."""
    if not path.is_file():
        raise InputRefused(f"--file: no file '{path}'")
    rows = []
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}: row {number}"
            if len(line) > MAX_LINE_BYTES:
                raise InputRefused(f"{where} is longer than {MAX_LINE_BYTES >> 20} MiB")
            if line.strip():
                rows.append(_read(line, number, where))
    if not rows:
        raise InputRefused(f"{path}: there is no row in it")
    return rows


def _read(line: bytes, number: int, where: str) -> Asked:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputRefused(f"{where} is no JSON object on one line: {str(error)[:80]}") from None
    if not isinstance(content, dict):
        raise InputRefused(f'{where} is no object; write {{"prompt": "..."}}')
    unknown = sorted(content.keys() - set(_FIELDS))
    if unknown:
        raise InputRefused(f"{where}: unknown field '{unknown[0][:60]}'; there are {', '.join(_FIELDS)}")
    if ("prompt" in content) == ("messages" in content):
        raise InputRefused(f"{where}: one of 'prompt' and 'messages' is wanted")
    for name, kind, what in (("prompt", str, "a text"), ("task", str, "a name"), ("id", str | int, "a text or number")):
        if name in content and not isinstance(content[name], kind):
            raise InputRefused(f"{where}: '{name}' is {str(content[name])[:40]}, and not {what}")
    if not _is_vector(content.get("vector", [])):
        raise InputRefused(f"{where}: 'vector' is {str(content['vector'])[:40]}, and no list of numbers")
    if "messages" in content:
        check_messages(content["messages"], where)
    _check_text(content, where)
    return Asked(number, **content)


def _is_vector(vector: object) -> bool:
    if not isinstance(vector, list):
        return False
    return all(isinstance(each, int | float) and not isinstance(each, bool) for each in vector)


def check_messages(messages: object, where: str) -> None:
    """Refuse what is no conversation that asks. Raises InputRefused."""
    if not isinstance(messages, list) or not messages:
        raise InputRefused(f"{where}: 'messages' is {str(messages)[:40]}, and no list of messages")
    for message in messages:
        is_one = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not is_one or message.get("role") not in ROLES or message.keys() - {"role", "content"}:
            raise InputRefused(
                f"{where}: {str(message)[:60]} is no message; it has a 'role' ({', '.join(ROLES)}) and a text 'content'"
            )
    if messages[-1]["role"] != "user":
        raise InputRefused(f"{where}: the last message is not the user's: nothing is asked")


def _check_text(content: object, where: str) -> None:
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputRefused(f"{where}: U+{ord(error.object[error.start]):04X} is half a letter, and no text") from None


__all__ = ["Asked", "ManyOptions", "check_messages", "generate_file", "read_prompts"]
