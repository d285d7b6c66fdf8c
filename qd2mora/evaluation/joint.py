"""Several voices that write one text: each reads it with a cache of its own, and their scores are blended.

A voice is a model, or a model in another state (without its adapter, with weakened gates). What is written is the
blend's: all voices are given the same token and read on.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from qd2mora.evaluation.decoding import Decoding, Wanted
from qd2mora.evaluation.subject import Subject


class Step(NamedTuple):
    """Which text goes on, by its number, and how many tokens of it are written."""

    text: int
    written: int


BEGIN = Step(0, 0)

Blend = Callable[[Tensor, Step], Tensor]
"""Makes scores (vocabulary,) of those of all voices (voices, vocabulary), float32 on the CPU."""


@dataclass(frozen=True)
class Voice:
    """A model, and the state that it speaks in."""

    subject: Subject
    state: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)


class JointDecoding:
    """A batch of texts that several voices write together; `step` as `Decoding` has it."""

    def __init__(self, voices: Sequence[Voice], blend: Blend, wanted: Sequence[Wanted]) -> None:
        self._voices, self._blend = voices, blend
        self._first = Decoding(voices[0].subject, wanted)
        self.answers = self._first.answers
        self._others = [Decoding(voice.subject, wanted, self.answers) for voice in voices[1:]]

    @property
    def is_done(self) -> bool:
        """Whether no text goes on."""
        return self._first.is_done

    @torch.no_grad()
    def step(self) -> list[int]:
        """Give each text that goes on a token; return their numbers. Raises NotFinite."""
        decodings = [self._first, *self._others]
        scores = []
        for voice, decoding in zip(self._voices, decodings, strict=True):
            with voice.state():
                logits = decoding.next_logits().cpu()
            # By text: a voice whose rows may not leave its batch has more of them than the others.
            scores.append(dict(zip(decoding.live, logits, strict=True)))
        blended = [
            self._blend(torch.stack([each[number] for each in scores]), Step(number, len(self.answers[number].chosen)))
            for number in self._first.live
        ]
        tokens = self._first.chosen(torch.stack(blended))
        for decoding in decodings:
            decoding.go_on(tokens)
        return list(tokens)


__all__ = ["BEGIN", "Blend", "JointDecoding", "Step", "Voice"]
