"""A conversation to rows: rendered up to each answer and with it, cut where an answer begins, learned turn by turn.

What an answer adds to the text is learned, the sign that ends the turn included; where a template marks what is
generated, its marks. One row holds as many answers as the template words the same with what comes after them; a
template that rewrites earlier turns gives a row for each.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from qd2mora.data.chat import closing_sign
from qd2mora.data.chat_template import ChatTemplate, Messages
from qd2mora.data.conversation import Conversation, Message, with_arguments
from qd2mora.data.file_rows import BadRow
from qd2mora.data.pair import Pair, Part
from qd2mora.data.parts import parts_of
from qd2mora.data.spans import signed, unsigned

Span = tuple[int, int]

REWRITTEN = "become a row for each answer, as the chat template rewrites earlier turns"
_REASONING = "bring reasoning that the chat template leaves out"
_SHORTENED = "have answers of which the chat template leaves out a part"
_PROBES = ("probe of an answer", "another one, to compare")
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_of_a_tool",
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {"probe_of_a_key": {"type": "string", "description": "A key."}},
            "required": ["probe_of_a_key"],
        },
    },
}
_CALL = {
    "id": "probe1234",
    "type": "function",
    "function": {"name": "probe_of_a_tool", "arguments": {"probe_of_a_key": "probe_of_a_value"}},
}


@dataclass(frozen=True)
class _Turn:
    """An answer: the number of its message, the conversation's text with it, where in it what the model writes begins,
    and what the template marks of it."""

    number: int
    text: str
    start: int
    marks: list[Span]


@dataclass
class _Row:
    """Answers that share a row. `learned`: those that are, with where they begin and end in the text of the last."""

    turns: list[_Turn] = field(default_factory=list)
    learned: list[tuple[_Turn, Span]] = field(default_factory=list)

    @property
    def last(self) -> _Turn:
        return self.learned[-1][0]


class Turns:
    """Makes rows of conversations that one template words."""

    def __init__(self, template: ChatTemplate, how: str | None = None) -> None:
        """`how`: `together`, one row for all answers; `each`, one for each; `last`, the last alone; None tells."""
        self.template, self.how = template, how

    def pairs(self, talk: Conversation) -> tuple[list[Pair], list[str]]:
        """Return a conversation's rows, and remarks on how they were made. Raises BadRow."""
        messages = self._as_worded(talk)
        turns = self._turns(messages, talk)
        remarks = list(self._remarks(messages, turns))
        rows = self._rows(turns, talk.is_learned)
        if self.how is None and len(rows) > 1:
            remarks.append(REWRITTEN)
        return [self._pair(row, messages, talk) for row in rows], remarks

    @cached_property
    def _sign(self) -> str:
        return closing_sign(self.template)

    @cached_property
    def _words_tools(self) -> bool:
        try:
            text = self.template.render([{"role": "user", "content": "question"}], asking=True, tools=[_TOOL])
        except BadRow:
            return True  # the row itself is told why
        return "probe_of_a_tool" in text

    @cached_property
    def _arguments(self) -> tuple[bool, ...]:
        """How calls may bring their arguments: as objects (False), as JSON text (True); empty: calls are left out."""
        found, is_refused = [], False
        for as_text in (False, True):
            call = with_arguments({"role": "assistant", "content": "", "tool_calls": [_CALL]}, as_text)
            try:
                text = self.template.render([{"role": "user", "content": "question"}, call], tools=[_TOOL])
            except BadRow:
                is_refused = True
                continue
            whole = all(word in text for word in ("probe_of_a_tool", "probe_of_a_key", "probe_of_a_value"))
            # Not as Python shows an object, nor as JSON of JSON.
            if whole and "'probe_of_a_key'" not in text and '\\"probe_of_a_key' not in text:
                found.append(as_text)
        if not found and is_refused:
            return (False,)  # the row itself is told why
        return tuple(found)

    def _as_worded(self, talk: Conversation) -> list[Message]:
        """Return the messages up to the last that is learned, their calls as the template takes them. Raises BadRow."""
        if talk.tools and not self._words_tools:
            raise BadRow("field 'tools' is left out by the chat template", "; take it out, or name template: chatml")
        messages = list(talk.messages[: talk.last + 1])
        for number, message in enumerate(messages):
            if "tool_calls" not in message:
                continue
            if not self._arguments:
                raise BadRow("tool calls are left out by the chat template", "; name template: chatml, or take it out")
            if len(self._arguments) == 1:
                messages[number] = with_arguments(message, self._arguments[0])
        return messages

    def _turns(self, messages: list[Message], talk: Conversation) -> list[_Turn]:
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if self.how == "last":
            numbers = numbers[-1:]
        asked = self._asked(messages, numbers, talk.tools)
        told = self.template.render_marked([messages[: number + 1] for number in numbers], talk.tools)
        turns = []
        for number, before, (text, marks) in zip(numbers, asked, told, strict=True):
            start = len(before)
            if not before or not text.startswith(before):
                start = self._start(messages[:number], talk.tools, before, text)
            turns.append(_Turn(number, text, start, [span for span in marks if span[0] < span[1]]))
        self._refuse_left_out(messages, turns)
        return turns

    def _asked(self, messages: list[Message], numbers: list[int], tools: Messages) -> list[str]:
        """Return the text up to where each answer begins; nothing where a template cannot word a talk of no message."""
        asked = [messages[:number] for number in numbers if number]
        texts = self.template.render_each(asked, asking=True, tools=tools) if asked else []
        return texts if numbers[0] else ["", *texts]

    def _start(self, before: Messages, tools: Messages, asked: str, told: str) -> int:
        """Return where an answer begins whose prompt is worded otherwise when it is asked, as with an open `<think>`.

        That is where texts of other answers part; the prompt that is asked must begin with all before it.
        """
        others = [[*before, {"role": "assistant", "content": probe}] for probe in _PROBES]
        texts = [told, *self.template.render_each(others, tools=tools)]
        if not asked:
            return len(_common_start(texts))
        if not asked.startswith(_common_start(texts).rstrip()):
            raise BadRow("the chat template words a question otherwise once it is answered", "; name template: chatml")
        return len(_common_start([asked, *texts]))

    def _rows(self, turns: list[_Turn], is_learned: Sequence[bool]) -> list[_Row]:
        rows: list[_Row] = []
        for turn in turns:
            kept = self._kept(rows[-1].turns[-1].text, turn) if rows else None
            if kept is None and rows and self.how == "together" and not self._tells_all(turns, is_learned):
                raise BadRow("the chat template rewrites earlier turns", "; leave turns out, or name each or last")
            if not rows or (kept is None and self.how != "together") or self.how in ("each", "last"):
                rows.append(_Row())
            elif rows[-1].learned and kept is not None:
                before, (start, stop) = rows[-1].learned[-1]
                rows[-1].learned[-1] = before, (start, min(stop, kept))
            rows[-1].turns.append(turn)
            if is_learned[turn.number]:
                rows[-1].learned.append((turn, (turn.start, len(turn.text))))
        return [row for row in rows if row.learned]

    def _tells_all(self, turns: list[_Turn], is_learned: Sequence[bool]) -> bool:
        """Tell whether marks say what is learned wherever a template puts it, and all that they say is."""
        return self.template.marks_answers and all(is_learned[turn.number] for turn in turns)

    def _kept(self, done: str, turn: _Turn) -> int | None:
        """Return how much of an earlier text still stands in this one; None where it was rewritten.

        Some templates close a text, not a turn, with the end token.
        """
        for before in (done, done.removesuffix(self.template.end)):
            if turn.text.startswith(before) and turn.start >= len(before):
                return len(before)
        return None

    def _pair(self, row: _Row, messages: list[Message], talk: Conversation) -> Pair:
        text, is_marked = row.last.text, self.template.marks_answers
        segments, place, closed = [], 0, list[int]()
        for (start, stop), number in self._marked(row) if is_marked else self._unmarked(row):
            answer = text[start:stop]
            if not is_marked:
                answer = self._closed(answer, messages[number])
                closed += [stop] * (len(answer) - (stop - start))
            segments += [text[place:start], answer]
            place = stop
        given, said = "".join(segments[:-1]), self._said(segments[-1], messages[row.last.number])
        if is_marked and text[place:]:  # a token may reach across the end of a mark
            segments.append(text[place:])
        parts = parts_of("".join(segments), messages[: row.last.number + 1], talk.tools)
        spans = None
        if talk.spans is not None:
            # Letters that close an answer stand before what comes after it.
            found = self._spans(row, messages, talk)
            spans = tuple(
                (mark, start + _upto(closed, start), stop + _upto(closed, stop - 1)) for mark, start, stop in found
            )
        return Pair(given, said, segments=tuple(segments), is_marked=is_marked, parts=tuple(parts), spans=spans)

    def _spans(self, row: _Row, messages: list[Message], talk: Conversation) -> list[Part]:
        """Return the marked spans in letters of a row's text: rendered once more with signs around them. BadRow."""
        spans = [span for span in talk.spans or () if int(span.place) <= row.last.number]
        if not spans:
            return []
        asked = [dict(message) for message in messages[: row.last.number + 1]]
        for place, group in itertools.groupby(enumerate(spans), key=lambda each: int(each[1].place)):
            asked[place]["content"] = signed(asked[place]["content"], group)
        text, places = unsigned(self.template.render(asked, tools=talk.tools))
        if text != row.last.text or len(places) < len(spans):
            raise BadRow(
                "the chat template words a text otherwise where a span is marked",
                "; template: chatml or plain words it as it is",
            )
        return sorted(((span.mark, *places[number]) for number, span in enumerate(spans)), key=lambda part: part[1])

    def _unmarked(self, row: _Row) -> list[tuple[Span, int]]:
        return [(span, turn.number) for turn, span in row.learned]

    def _marked(self, row: _Row) -> list[tuple[Span, int]]:
        """Return what the template marks of the answers that are learned: a mark is the last answer's that it reaches.

        Raises BadRow where that is nothing.
        """
        learned = {turn.number for turn, _ in row.learned}
        found = []
        for span in row.last.marks:
            reached = [turn.number for turn in row.turns if turn.start < span[1]]
            if self.how == "together":
                reached = reached or [row.turns[0].number]
            if reached and reached[-1] in learned:
                found.append((span, reached[-1]))
        if not found:
            raise BadRow("the chat template marks nothing of an answer", ", there is nothing to learn")
        return found

    def _closed(self, answer: str, message: Message) -> str:
        """Return an answer with the end token, where the template leaves the turn open."""
        if "tool_calls" in message:
            is_open = not self._sign
        else:
            # The last word: a template may trim the answer, or leave out how it begins.
            is_open = answer.rstrip().endswith(message["content"].split()[-1])
        return answer + self.template.end if is_open else answer

    def _said(self, answer: str, message: Message) -> str:
        """Return what is written in an answer, without the sign that ends it."""
        content = str(message.get("content", ""))
        if "tool_calls" in message or content.strip() not in answer:
            return answer.rstrip().removesuffix(self._sign)
        answer = answer[: answer.rindex(content.strip()) + len(content.strip())]
        return content if answer.strip() == content.strip() else answer

    def _refuse_left_out(self, messages: list[Message], turns: list[_Turn]) -> None:
        """Refuse a conversation of which the template words less than was said. Raises BadRow."""
        for message in messages:
            if message["role"] != "assistant" and not words_of(message["content"], turns[-1].text):
                raise BadRow(f"a message of the {message['role']} is left out by the chat template")
        for turn in turns:
            answer, message = turn.text[turn.start :], messages[turn.number]
            calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
            if any(name not in answer for name in calls):
                raise BadRow("a tool call is left out by the chat template")
            if not calls and not words_of(message["content"], answer):
                raise BadRow("an answer is left out by the chat template")

    def _remarks(self, messages: list[Message], turns: list[_Turn]) -> Iterator[str]:
        answers = [(messages[turn.number], turn.text[turn.start :]) for turn in turns]
        if not all(words_of(message.get("reasoning_content", ""), answer) for message, answer in answers):
            yield _REASONING
        # White space aside: templates trim, and set reasoning apart.
        if any(_dense(message.get("content", "")) not in _dense(answer) for message, answer in answers):
            yield _SHORTENED


def _upto(places: Sequence[int], place: int) -> int:
    return sum(each <= place for each in places)


def _dense(text: str) -> str:
    return "".join(text.split())


def _common_start(texts: Sequence[str]) -> str:
    """Return what all texts begin with."""
    first, last = min(texts), max(texts)  # of texts in order these two differ first
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return first[: sum(1 for _ in same)]


def words_of(said: str, text: str) -> bool:
    """Tell whether a text words something that was said: by its last word, as it is or as JSON has it."""
    last = said.split()[-1:]
    return all(word in text or json.dumps(word, ensure_ascii=False)[1:-1] in text for word in last)


__all__ = ["REWRITTEN", "Turns", "words_of"]
