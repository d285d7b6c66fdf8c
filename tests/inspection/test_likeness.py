"""The sentence that a mixture acts nearly like one LoRA."""

import pytest

from qd2mora.inspection import likeness_line
from qd2mora.recipe import Adapter


@pytest.mark.parametrize(
    ("entropy", "down", "up", "words"),
    [
        (0.94, 0.05, 0.1, ["routers are near uniform (mean gate entropy 94.0% of its maximum): the mixture acts"]),
        (0.998, 0.05, 0.72, ["near uniform", " and up experts are alike (mean |cos| 0.72): the mixture acts"]),
        (0.5, 0.9, 0.1, ["down experts are alike (mean |cos| 0.90)"]),
        (0.5, None, 0.7, ["up experts are alike"]),
    ],
)
def test_uniform_routers_or_like_experts_are_told_in_one_sentence_with_what_to_try(
    entropy: float, down: float | None, up: float, words: list[str]
) -> None:
    line = likeness_line({"entropy": entropy, "cos_down": down, "cos_up": up})
    assert line is not None and line.count("acts nearly like one LoRA") == 1 and "\n" not in line
    for each in (*words, "train.learning_rate", "diversity_cos=1e-2", "qd2mora compare"):
        assert each in line
    Adapter.model_validate({"penalties": {"diversity_cos": 1e-2}, "gates": {"down": {"temperature": 0.5}}})


@pytest.mark.parametrize(
    "summary",
    [
        {"entropy": 0.93, "cos_down": 0.69, "cos_up": 0.69},
        {"entropy": None, "cos_down": None, "cos_up": None},
        {"cos_down": 0.9, "cos_up": 0.9},  # no routers: one LoRA by design
        {},
    ],
)
def test_routers_that_choose_among_experts_that_differ_are_not_spoken_of(summary: dict[str, float | None]) -> None:
    assert likeness_line(summary) is None
