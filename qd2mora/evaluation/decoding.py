"""Many texts continued side by side, a token of each a step, every one as if it were alone.

Prompts are padded on the left, with positions counted from each text's own first token; each draws by a generator of
its own, on the CPU whatever device computes. So what a text becomes depends on no other, up to the order of floating
point sums: in float32 answers are the same alone and in a batch, in 16 bits two tokens that are as good as equally
likely may change places. A text that has ended leaves the batch and its cache, so that a place is free at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qd2mora.base.passes import CachedText, device_of, last_states, output_head, read_on
from qd2mora.errors import InputRefused, NotFinite
from qd2mora.evaluation.ends import HALF_LETTER, Ends
from qd2mora.evaluation.subject import Subject
from qd2mora.mixture import forgoes_cache


@dataclass(frozen=True)
class Wanted:
    """One text to continue. `task`: its number; `stops`: texts that end it, beside the model's own ends.

    `num_top`: how many of the likeliest tokens are told with each token.
    """

    ids: list[int]
    ends: Ends
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()
    num_top: int = 0
    task: int = 0
    vector: tuple[float, ...] | None = None
    marks: tuple[int, ...] | None = None
    """Of each token of `ids`, the number of its span's adapter; `answer_mark`: that of all that is written."""
    answer_mark: int = 0


@dataclass(frozen=True)
class Chosen:
    """A token that was chosen, its log probability, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Answer:
    """What becomes of one text: its tokens, and the text of them as soon as no later token can change it."""

    def __init__(self, subject: Subject, wanted: Wanted) -> None:
        self.wanted, self.chosen = wanted, list[Chosen]()
        self.ends = Ends(wanted.ends.ids, (*wanted.ends.signs, *wanted.stops))
        self.finish: str | None = None
        """`stop` at an end, `length` at the last token; None while it goes on."""
        self.shown, self._tokenizer = "", subject.tokenizer
        self._draws = torch.Generator().manual_seed(wanted.seed)

    @property
    def num_tokens(self) -> int:
        """Tokens that were written, the one that ended it among them."""
        return len(self.chosen)

    @property
    def text(self) -> str:
        """All that was written, up to its end."""
        return self.ends.cut(self._decoded())

    def choose(self, logits: Tensor) -> int:
        """Take the next token, given the logits (vocabulary,) float32 on the CPU. Raises NotFinite."""
        if bool((logits.isnan() | logits.isposinf()).any()):
            raise NotFinite("the model's scores are not finite: its weights are too large for its dtype, or damaged")
        # Told are the model's own probabilities, whatever temperature and top-p draw by.
        logs = logits.log_softmax(-1)
        token = int(logits.argmax())
        if self.wanted.temperature > 0:
            token = drawn(logits, self.wanted.temperature, self.wanted.top_p, self._draws)
        best = logs.topk(self.wanted.num_top) if self.wanted.num_top else None
        top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        self.chosen.append(Chosen(token, float(logs[token]), top))
        if token in self.ends.ids or self._has_stopped():
            self.finish = "stop"
        elif len(self.chosen) >= self.wanted.max_new_tokens:
            self.finish = "length"
        return token

    def news(self) -> str:
        """Return what can be shown and was not yet."""
        text = self.text
        if self.finish is None:
            text = self.ends.settled(text)
            if text.endswith(HALF_LETTER) or not text.startswith(self.shown):
                return ""
        piece = text[len(self.shown) :]
        self.shown = text
        return piece

    def _has_stopped(self) -> bool:
        if not self.ends.signs:
            return False
        text = self._decoded()
        return self.ends.cut(text) != text

    def _decoded(self) -> str:
        written = self.ends.before([each.token for each in self.chosen])
        text: str = self._tokenizer.decode(written, skip_special_tokens=True)
        return text


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that nothing can be drawn at. Raises InputRefused."""
    # Nearer to 0, logits divided by it are no float32 any more.
    if temperature != 0 and not 1e-3 <= temperature <= 1e3:
        fits = "at most 1000" if temperature > 1e3 else "0 for the likeliest token, or at least 0.001"
        raise InputRefused(f"--temperature: {temperature} will not do: {fits}")


def drawn(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw a token as transformers does: logits over temperature, the unlikely tail beyond `top_p` left out."""
    # In transformers' order and by its ascending sort, so that one seed draws the same token there.
    scores = logits / temperature
    if top_p < 1:
        ordered, order = scores.sort(descending=False)
        tail = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        tail[-1] = False  # the likeliest stays, however small top_p is
        scores = scores.masked_fill(torch.zeros_like(tail).scatter(0, order, tail), -torch.inf)
    return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))


class Decoding:
    """A batch of texts on their way; `step` gives each a token, until none goes on.

    Where several voices read the same texts (`joint`), one has the answers and the others are given them.
    """

    def __init__(self, subject: Subject, wanted: Sequence[Wanted], answers: list[Answer] | None = None) -> None:
        self.subject = subject
        self.answers = [Answer(subject, each) for each in wanted] if answers is None else answers
        self.live = list(range(len(wanted)))
        """Numbers of the answers whose rows stand in the batch, in its order."""
        self._device, self._head = device_of(subject.plain), output_head(subject.plain)
        # A router that keeps something of each row's prompt would lose count of rows that leave.
        self._may_leave = subject.may_fork
        self._keeps_cache = not (subject.is_adapted and forgoes_cache(subject.model))
        self._cached: CachedText | None = None
        width = max(len(each.ids) for each in wanted)
        pad = subject.tokenizer.pad_token_id
        # On the left: the last token of every text stands in the last column, of which alone logits are made.
        self._ids = torch.tensor([[pad] * (width - len(each.ids)) + each.ids for each in wanted], device=self._device)
        self._mask = torch.tensor(
            [[0] * (width - len(each.ids)) + [1] * len(each.ids) for each in wanted], device=self._device
        )

    @property
    def is_done(self) -> bool:
        """Whether no text goes on."""
        return all(self.answers[number].finish is not None for number in self.live)

    @torch.no_grad()
    def step(self) -> list[int]:
        """Give each text that goes on a token; return their numbers. Raises NotFinite."""
        tokens = self.chosen(self.next_logits().cpu())
        self.go_on(tokens)
        return list(tokens)

    def chosen(self, logits: Tensor) -> dict[int, int]:
        """Return the next token of each text that goes on, by its number, of logits (rows, vocabulary) on the CPU."""
        tokens = {}
        for number, of_row in zip(self.live, logits, strict=True):
            answer = self.answers[number]
            if answer.finish is None:
                tokens[number] = answer.choose(of_row)
        return tokens

    def go_on(self, tokens: Mapping[int, int]) -> None:
        """Take tokens by the number of their text; one that has ended stays in the batch for its routers' sake."""
        pad = self.subject.tokenizer.pad_token_id
        self._append([tokens.get(number, pad) for number in self.live])
        self._let_go()

    def cancel(self, number: int) -> None:
        """End a text that nobody waits for any more."""
        if self.answers[number].finish is None:
            self.answers[number].finish = "cancelled"
        self._let_go()

    def next_logits(self) -> Tensor:
        """Return the logits of each live row's next token, (rows, vocabulary) float32."""
        # Each text counts from its own first token, so that rotary angles are those it has alone.
        positions = (self._mask.cumsum(-1) - 1).clamp_min(0)
        batch = {"input_ids": self._ids, "attention_mask": self._mask, "position_ids": positions}
        if not self._keeps_cache:
            # Without a cache every step reads the whole text; its rows are told once, and again where some have left.
            # Marks are told of every token, and so again with each.
            if self._ids.shape[1] == self._width_given or self.subject.reads_spans:
                self._route()
            return self._head(last_states(self.subject.plain, batch)[:, -1])
        if self._cached is None:
            self._route()
            self._cached = read_on(self.subject.plain, batch)
        else:
            last = {"input_ids": self._ids[:, -1:], "position_ids": positions[:, -1:]}
            self._cached = read_on(self.subject.plain, batch | last, self._cached)
        return self._head(self._cached.states[:, -1])

    @property
    def _width_given(self) -> int:
        return max(len(each.wanted.ids) for each in self.answers)

    def _route(self) -> None:
        """Tell the routers of the rows that are in the batch."""
        wanted = [self.answers[number].wanted for number in self.live]
        rows = {"task_index": torch.tensor([each.task for each in wanted], device=self._device)}
        vectors = [each.vector for each in wanted if each.vector is not None]
        if len(vectors) == len(wanted):
            rows["external"] = torch.tensor(vectors, device=self._device)
        marks = [self._marks_of(each) for each in wanted if each.marks is not None]
        if len(marks) == len(wanted):
            rows["marks"] = torch.tensor(marks, device=self._device)
            rows["answer_mark"] = torch.tensor([each.answer_mark for each in wanted], device=self._device)
        self.subject.route(rows)

    def _marks_of(self, wanted: Wanted) -> list[int]:
        """Return a mark for every column of the batch: padding has none, what was written has the answer's."""
        given = list(wanted.marks or ())
        written = self._ids.shape[1] - self._width_given
        return [0] * (self._width_given - len(given)) + given + [wanted.answer_mark] * written

    def _append(self, tokens: list[int]) -> None:
        column = torch.tensor(tokens, device=self._device)[:, None]
        self._ids = torch.cat([self._ids, column], 1)
        self._mask = torch.cat([self._mask, torch.ones_like(column)], 1)

    def _let_go(self) -> None:
        """Take the rows that have ended out of the batch."""
        keep = [place for place, number in enumerate(self.live) if self.answers[number].finish is None]
        if not self._may_leave or len(keep) == len(self.live):
            return
        self.live = [self.live[place] for place in keep]
        if not keep:
            self._cached = None
            return
        rows = torch.tensor(keep, device=self._device)
        self._ids, self._mask = self._ids[rows], self._mask[rows]
        if self._cached is not None:
            self._cached.cache.batch_select_indices(rows)
        self._route()


__all__ = ["Answer", "Chosen", "Decoding", "Wanted", "check_temperature"]
