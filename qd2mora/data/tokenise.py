"""Text to tokens, many rows at once: the tokenizers library's own threads work while the next rows are read.

Prompt and answer are tokenised apart, so that the prompt's tokens are those of a prompt that is asked, and no token
lies on both sides of what is masked. A conversation is tokenised whole, as its template is meant to be; where a token
would lie across a boundary, from piece to piece.
"""

import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from qd2mora.data.pair import Pair, Part
from qd2mora.data.spans import marks_of
from qd2mora.errors import InputRefused

CHUNK = 2048
"""Rows that are tokenised together, at most."""
CHUNK_LETTERS = 1 << 20
"""Letters that are tokenised together, but for one row that alone has more."""
AHEAD = 2
"""Chunks that are tokenised at once: the library's threads work on one while Python takes the ids of the other."""

_SPACES = ("▁", "Ġ", " ")  # how tokenizers write a space in a token
_ANCHORS = ("\n", ".", "1", "a")


class Tokens(NamedTuple):
    """One row: `parts`, ids that follow each other, with the end token; `bounds`, where given text ends and learned
    text ends in turn, the last bound is where the last answer begins; `spans`: what a conversation consists of;
    `marks`: the marked spans, None where the data marks none."""

    parts: tuple[Sequence[int], ...]
    bounds: tuple[int, ...]
    spans: tuple[Part, ...] = ()
    marks: tuple[Part, ...] | None = None

    @property
    def ids(self) -> list[int]:
        return list(itertools.chain.from_iterable(self.parts))


class Tokeniser:
    """A tokenizer's text-to-ids, with no padding and no cut whatever somebody set on it before."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, clock: str | None = None) -> None:
        """`clock`: the time that a chat template reads, None for now."""
        self.clock = clock
        self.end = tokenizer.eos_token_id
        self._slow = tokenizer
        self._fast: Tokenizer | None = None
        if tokenizer.is_fast:
            self._fast = _fast_of(_backend_text(tokenizer))
        first = str(tokenizer.convert_ids_to_tokens(self.texts(["a"], special=False)[0])[0])
        self._adds_space = first[:1] in _SPACES

    def texts(self, texts: list[str], *, special: bool) -> list[list[int]]:
        """Return the ids of each text; `special`: with what the tokenizer puts around a text."""
        if not texts:  # transformers 5 raises on an empty batch
            return []
        if self._fast is None:
            return self._slow(texts, add_special_tokens=special)["input_ids"]
        return [found.ids for found in self._fast.encode_batch_fast(texts, add_special_tokens=special)]

    def tokens(self, pairs: Sequence[Pair]) -> list[Tokens]:
        """Return the tokens of each row. Raises InputRefused where spans are marked and tokens tell no letters."""
        if any(pair.spans is not None for pair in pairs) and self._fast is None:
            raise InputRefused("data.spans: this tokenizer does not tell the letters of its tokens; a fast one does")
        return [self._with_marks(pair, found) for pair, found in zip(pairs, self._tokens(pairs), strict=True)]

    def _tokens(self, pairs: Sequence[Pair]) -> list[Tokens]:
        plain = [pair for pair in pairs if not pair.segments]
        prompts = self.texts([pair.prompt for pair in plain], special=True)
        # Answers of a task are often few: each is tokenised once.
        known: dict[bool, dict[str, list[int]]] = {}
        for starts in (True, False):
            texts = list(dict.fromkeys(pair.answer for pair in plain if _starts(pair) == starts))
            known[starts] = dict(zip(texts, self.answers(texts, starts_word=starts), strict=True))
        answers = [known[_starts(pair)][pair.answer] for pair in plain]
        talks = iter(self._conversations([pair for pair in pairs if pair.segments]))
        joined = (self._joined(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True))
        return [next(talks) if pair.segments else next(joined) for pair in pairs]

    def answers(self, texts: list[str], *, starts_word: bool) -> list[list[int]]:
        """Return the ids of texts that follow a prompt; `starts_word`: as texts of their own.

        SentencePiece puts a space before a text; one that goes on is tokenised behind a letter that no token joins.
        """
        own = self.texts(texts, special=False)
        if starts_word or not self._adds_space:
            return own
        found: list[list[int] | None] = [None] * len(texts)
        for anchor in _ANCHORS:
            (start,) = self.texts([anchor], special=False)
            for place, ids in enumerate(self.texts([anchor + text for text in texts], special=False)):
                if found[place] is None and ids[: len(start)] == start:
                    found[place] = ids[len(start) :]
        return [own[place] if ids is None else ids for place, ids in enumerate(found)]

    def _with_marks(self, pair: Pair, tokens: Tokens) -> Tokens:
        """Return a row's tokens with its marked spans, whose letters are looked for piece by piece."""
        if pair.spans is None:
            return tokens
        texts: tuple[str, ...] = (pair.prompt, pair.answer)
        if pair.segments:
            texts = ("".join(pair.segments),) if len(tokens.parts) == 1 else pair.segments
        offsets, start = list[tuple[int, int]](), 0
        for text, ids in zip(texts, tokens.parts, strict=False):
            offsets += [(start + first, start + last) for first, last in self.letters_of(text, list(ids))]
            start += len(text)
        return tokens._replace(marks=marks_of(offsets, pair.spans))

    def letters_of(self, text: str, ids: list[int]) -> list[tuple[int, int]]:
        """Return the letters of each of the tokens that this made of a text, whichever way it did."""
        assert self._fast is not None
        for special in (True, False):
            whole = self._fast.encode(text, add_special_tokens=special)
            if whole.ids[: len(ids)] == ids:
                return list(whole.offsets[: len(ids)])
        for anchor in _ANCHORS:
            behind = self._fast.encode(anchor + text, add_special_tokens=False)
            if ids and behind.ids[-len(ids) :] == ids:
                return [(max(0, first - 1), max(0, last - 1)) for first, last in behind.offsets[-len(ids) :]]
        raise AssertionError("tokens of another text")

    def _joined(self, prompt: list[int], answer: list[int]) -> Tokens:
        if prompt and prompt[-1] == self.end:  # tokenizers that close every text
            prompt = prompt[:-1]
        return Tokens((prompt, answer, (self.end,)), (len(prompt),))

    def _conversations(self, talks: list[Pair]) -> list[Tokens]:
        if self._fast is None:
            return [self._piecewise(talk) for talk in talks]
        found = self._fast.encode_batch(["".join(talk.segments) for talk in talks], add_special_tokens=False)
        return [self._cut(encoding, talk) or self._piecewise(talk) for encoding, talk in zip(found, talks, strict=True)]

    def _cut(self, encoding: Encoding, talk: Pair) -> Tokens | None:
        """Return a conversation cut at its boundaries; None where a token lies across one."""
        places = list(itertools.accumulate(map(len, talk.segments)))
        spans = tuple(part for part in (_in_tokens(encoding, each) for each in talk.parts) if part[1] < part[2])
        if talk.is_marked:
            return _marked(encoding, list(zip(places[::2], places[1::2], strict=False)), spans)
        bounds = []
        for place in places[:-1]:
            token = encoding.char_to_token(place)
            if token is None or encoding.offsets[token][0] != place:
                return None
            if token and encoding.offsets[token - 1][1] > place:  # a letter of several tokens
                return None
            bounds.append(token)
        return Tokens((encoding.ids,), tuple(bounds), spans)

    def _piecewise(self, talk: Pair) -> Tokens:
        parts = talk.segments[: len(talk.segments) // 2 * 2]
        pieces = self.texts([parts[0]], special=False) + self.answers(list(parts[1:]), starts_word=False)
        bounds = list(itertools.accumulate(map(len, pieces)))
        return Tokens(tuple(pieces), tuple(bounds[:-1]))


def _in_tokens(encoding: Encoding, part: Part) -> Part:
    """Return a part in tokens; of no length where its ends are in none."""
    kind, start, stop = part
    first, last = encoding.char_to_token(start), encoding.char_to_token(stop - 1)
    if first is None or last is None:
        return kind, 0, 0
    return kind, first, last + 1


def _marked(encoding: Encoding, marks: list[tuple[int, int]], spans: tuple[Part, ...]) -> Tokens | None:
    """Return a conversation in which tokens that reach into a mark are learned, as transformers has it.

    What follows the last of them is left out. None where no token does.
    """
    bounds: list[int] = []
    waiting = deque(marks)
    for token, (start, stop) in enumerate(encoding.offsets):
        while waiting and start >= waiting[0][1]:
            waiting.popleft()
        is_learned = bool(waiting) and stop > waiting[0][0]
        if is_learned != len(bounds) % 2:  # an odd number of bounds: inside of one
            bounds.append(token)
    if not bounds:
        return None
    if len(bounds) % 2:
        bounds.append(len(encoding.ids))
    return Tokens((encoding.ids[: bounds[-1]],), tuple(bounds[:-1]), spans)


def tokenised(tokeniser: Tokeniser, pairs: Iterable[Pair]) -> Iterator[tuple[list[Pair], list[Tokens]]]:
    """Yield rows chunk by chunk with their tokens; the next chunks are tokenised while this one is worked on."""
    waiting: deque[tuple[list[Pair], Future[list[Tokens]]]] = deque()
    with ThreadPoolExecutor(AHEAD) as threads:
        for chunk in _chunks(pairs):
            waiting.append((chunk, threads.submit(tokeniser.tokens, chunk)))
            if len(waiting) > AHEAD:
                done, tokens = waiting.popleft()
                yield done, tokens.result()
        for done, tokens in waiting:
            yield done, tokens.result()


def _chunks(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    chunk: list[Pair] = []
    letters = 0
    for pair in pairs:
        chunk.append(pair)
        letters += len(pair.prompt) + len(pair.answer)
        if len(chunk) == CHUNK or letters > CHUNK_LETTERS:
            yield chunk
            chunk, letters = [], 0
    if chunk:
        yield chunk


def _starts(pair: Pair) -> bool:
    return pair.starts_word or not pair.prompt


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the names that a chat template may use for special tokens."""
    return {name: text for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}


@lru_cache(maxsize=4)
def _fast_of(text: str) -> Tokenizer:
    """Return the library's tokenizer of that text, the same one for every task and run of a process.

    Its threads keep, for good, what they remember of every tokenizer that they served: 18 MiB a task (tokenizers 0.23).
    """
    fast = Tokenizer.from_str(text)
    fast.no_padding()
    fast.no_truncation()
    return fast


def _backend_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a fast tokenizer in the JSON of the library that runs it."""
    backend: Any = tokenizer
    text: str = backend.backend_tokenizer.to_str()
    return text


def tokenizer_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return all that a tokenizer is: vocabulary, merges, added tokens, special ones, chat template."""
    if tokenizer.is_fast:
        whole = _backend_text(tokenizer)
    else:
        whole = json.dumps(sorted(tokenizer.get_vocab().items()))
    return "\0".join([whole, str(tokenizer.special_tokens_map), str(tokenizer.chat_template)])


__all__ = ["CHUNK", "Tokeniser", "Tokens", "special_tokens", "tokenised", "tokenizer_text"]
