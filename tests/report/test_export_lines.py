"""What is said of an export on the terminal."""

from dataclasses import replace

import pytest

from qd2mora.merging.fidelity import Fidelity
from qd2mora.report.exports import _on_16_bits

TRAINED_ON = Fidelity(base=2.0, routed=1.0, merged=1.0, kl_per_token=0.0, tokens=10)


@pytest.mark.parametrize(
    ("merged", "words"),
    [
        (1.3, "this LoRA is much worse (0.3000 nats a token, 30% of the gain)"),
        (1.01, "this LoRA is a little worse (0.0100 nats a token, 1% of the gain)"),
        (0.99, "it is no worse"),
    ],
)
def test_a_lora_says_what_it_is_worth_on_the_16_bit_base(merged: float, words: str) -> None:
    assert words in _on_16_bits(TRAINED_ON, replace(TRAINED_ON, merged=merged))


def test_a_lora_without_a_gain_says_what_it_costs_on_the_16_bit_base() -> None:
    none = replace(TRAINED_ON, routed=2.5)
    assert "(0.1000 nats a token) than" in _on_16_bits(none, replace(none, merged=1.1))
