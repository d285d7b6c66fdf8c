"""Objectives as their papers write them, row by row in float64: slow twins for tests.

`pi` and `ref` are log-probabilities of an answer's tokens, by the policy and by the reference.
"""

import math
from collections.abc import Sequence

Tokens = Sequence[float]


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigma(x: float) -> float:
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def mean(tokens: Tokens) -> float:
    return math.fsum(tokens) / len(tokens)


def ratio(pi: Tokens, ref: Tokens) -> float:
    return math.fsum(pi) - math.fsum(ref)


def dpo(pi_w: Tokens, pi_l: Tokens, ref_w: Tokens, ref_l: Tokens, beta: float, smoothing: float = 0.0) -> float:
    """Rafailov et al., equation 7; with `smoothing` the conservative one of Mitchell's note."""
    h = beta * (ratio(pi_w, ref_w) - ratio(pi_l, ref_l))
    return -(1 - smoothing) * log_sigma(h) - smoothing * log_sigma(-h)


def hinge(pi_w: Tokens, pi_l: Tokens, ref_w: Tokens, ref_l: Tokens, beta: float) -> float:
    """SLiC-HF's hinge on the same difference."""
    return max(0.0, 1 - beta * (ratio(pi_w, ref_w) - ratio(pi_l, ref_l)))


def ipo(pi_w: Tokens, pi_l: Tokens, ref_w: Tokens, ref_l: Tokens, beta: float) -> float:
    """Azar et al., equation 17, with means over tokens."""
    h = (mean(pi_w) - mean(ref_w)) - (mean(pi_l) - mean(ref_l))
    return (h - 1 / (2 * beta)) ** 2


def orpo(pi_w: Tokens, pi_l: Tokens, beta: float) -> float:
    """Hong et al., equations 6 and 7."""

    def odds(tokens: Tokens) -> float:
        p = math.exp(mean(tokens))
        return p / (1 - p)

    return -mean(pi_w) - beta * log_sigma(math.log(odds(pi_w) / odds(pi_l)))


def simpo(pi_w: Tokens, pi_l: Tokens, beta: float, gamma: float) -> float:
    """Meng et al., equation 6."""
    return -log_sigma(beta * mean(pi_w) - beta * mean(pi_l) - gamma)


def peam(pi_w: Tokens, pi_l: Tokens, ref_w: Tokens, ref_l: Tokens, beta: float, contrast: float) -> float:
    """Imitation and DPO's loss, weighed by the reference's chance of the failure among the two answers."""
    failure, correction = math.exp(math.fsum(ref_l)), math.exp(math.fsum(ref_w))
    worth = failure / (failure + correction)
    return worth * (contrast * dpo(pi_w, pi_l, ref_w, ref_l, beta) - mean(pi_w))


def kto(pi: Tokens, ref: Tokens, is_good: bool, z0: float, beta: float, weight: float) -> float:
    """Ethayarajh et al., equation 8, as a loss: what is left of the value of a good or a bad answer."""
    r = ratio(pi, ref)
    value = sigma(beta * (r - z0)) if is_good else sigma(beta * (z0 - r))
    return weight * (1 - value)


def bradley_terry(reward_w: float, reward_l: float, margin: float = 0.0) -> float:
    """Bradley and Terry's likelihood of the choice, with a margin (Llama 2, equation 2)."""
    return -log_sigma(reward_w - reward_l - margin)
