"""How sure a model is against how often it is right: a temperature for its scores, fitted on rows (MoCaE's step).

Source: MoCaE (github fiveai/MoCaE) calibrates each detector before it mixes their predictions; here it is one number
for the next token's scores, of the least negative log-likelihood of the answers' tokens. Expected calibration error:
tokens in BINS of equal width by the probability of the likeliest, sum of share |mean probability - share right|.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qd2mora.base.passes import label_states, labels_of, output_head
from qd2mora.data import Row
from qd2mora.evaluation.answering import batch_of
from qd2mora.evaluation.subject import Subject

BINS = 15
MOST_TOKENS = 512
"""Answers' tokens whose scores are kept, for each half: 262 MB at a vocabulary of 128,000."""
# Sixty rounds of golden section leave 2e-12 of a bracket of log T that is 6 wide.
_COLDEST, _HOTTEST, _ROUNDS = 0.05, 20.0, 60


@dataclass(frozen=True)
class Calibration:
    """A temperature, and the error without and with it on `tokens` of rows that it was not fitted on."""

    temperature: float
    before: float
    after: float
    tokens: int

    @property
    def line(self) -> str:
        """Its numbers in words."""
        return (
            f"temperature {self.temperature:.2f}, expected calibration error {self.before:.3f} -> {self.after:.3f} on "
            f"{self.tokens} tokens of rows it was not fitted on"
        )


def calibrated(subject: Subject, rows: Sequence[Row]) -> Calibration:
    """Fit a temperature on every second row, and measure it on the others."""
    # Every second row, and not halves: in a file that is sorted, halves would be of two kinds.
    logits, labels = answer_scores(subject, rows[::2])
    temperature = best_temperature(logits, labels)
    logits, labels = answer_scores(subject, rows[1::2])
    before, after = (calibration_error(logits / each, labels) for each in (1.0, temperature))
    return Calibration(temperature, before, after, len(labels))


@torch.no_grad()
def answer_scores(subject: Subject, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Return scores (tokens, vocabulary) float32 of answers' tokens, and the tokens, on the CPU; up to MOST_TOKENS."""
    logits, labels, number = list[Tensor](), list[Tensor](), 0
    for row in rows:
        batch = batch_of(subject, [row], "right")
        subject.route(batch)
        logits.append(output_head(subject.plain)(label_states(subject.plain, batch)).float().cpu())
        labels.append(labels_of(batch).cpu())
        number += len(labels[-1])
        if number >= MOST_TOKENS:
            break
    return torch.cat(logits), torch.cat(labels)


def best_temperature(logits_TW: Tensor, labels_T: Tensor) -> float:
    """Return the T of the least negative log-likelihood of softmax(logits / T), by golden section over log T."""
    # In 1 / T the loss is convex, and so has one minimum in log T as well.
    share = (math.sqrt(5) - 1) / 2
    low, high = math.log(_COLDEST), math.log(_HOTTEST)

    def loss(log_temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits_TW / math.exp(log_temperature), labels_T))

    for _ in range(_ROUNDS):
        left, right = high - share * (high - low), low + share * (high - low)
        if loss(left) <= loss(right):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)


def calibration_error(logits_TW: Tensor, labels_T: Tensor) -> float:
    """Return the expected calibration error of softmax(logits)."""
    sure, chosen = logits_TW.softmax(-1).max(-1)
    right = (chosen == labels_T).double()
    place = (sure * BINS).long().clamp_max(BINS - 1)
    # Each bin's share times the gap of its means is the gap of its sums, over all tokens.
    gap = torch.zeros(BINS, dtype=torch.float64).index_add(0, place, sure.double() - right)
    return float(gap.abs().sum() / len(labels_T))


__all__ = ["Calibration", "answer_scores", "best_temperature", "calibrated", "calibration_error"]
