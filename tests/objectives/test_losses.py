"""Objectives against their papers' equations in float64, and against TRL's own functions."""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reference_objectives as slow
import torch
from torch import Tensor

from qd2mora.data import Pair, Row
from qd2mora.objectives import Objective, Said, told
from qd2mora.objectives.dpo import Dpo
from qd2mora.objectives.kto import Kto
from qd2mora.objectives.orpo import Orpo, log_of_rest
from qd2mora.objectives.peam import Peam, is_due
from qd2mora.objectives.reward import Reward
from qd2mora.objectives.simpo import Simpo

LENGTHS = (3, 5, 1, 4, 7, 2)
"""Learned tokens of six lines, which are three pairs or six ratings."""
Lines = list[list[float]]


def drawn(seed: int, scale: float = 1.5) -> Lines:
    """Return log-probabilities of the tokens of each line."""
    generator = torch.Generator().manual_seed(seed)
    return [(-scale * torch.rand(length, generator=generator) - 0.01).tolist() for length in LENGTHS]


def lines_of(worths: Sequence[float | None] = (None,) * 6) -> list[Row]:
    return [
        Row(0, np.arange(4 + length, dtype=np.int32), 4, Pair("a prompt", "an answer", worth=worth))
        for length, worth in zip(LENGTHS, worths, strict=True)
    ]


def sums(lines: Lines) -> Tensor:
    return torch.tensor([-math.fsum(line) for line in lines], dtype=torch.float64)


PI, REF = drawn(1), drawn(2)
PAIRED: dict[str, tuple[Objective, Callable[[int], float]]] = {
    "dpo": (Dpo(0.3), lambda n: slow.dpo(PI[n], PI[n + 1], REF[n], REF[n + 1], 0.3)),
    "cdpo": (Dpo(0.3, "sigmoid", 0.2), lambda n: slow.dpo(PI[n], PI[n + 1], REF[n], REF[n + 1], 0.3, 0.2)),
    "hinge": (Dpo(0.3, "hinge"), lambda n: slow.hinge(PI[n], PI[n + 1], REF[n], REF[n + 1], 0.3)),
    "ipo": (Dpo(0.3, "ipo"), lambda n: slow.ipo(PI[n], PI[n + 1], REF[n], REF[n + 1], 0.3)),
    "orpo": (Orpo(0.4), lambda n: slow.orpo(PI[n], PI[n + 1], 0.4)),
    "reward": (Reward(), lambda n: slow.bradley_terry(-math.fsum(PI[n]), -math.fsum(PI[n + 1]))),
    "peam": (Peam(0.3, 0.8), lambda n: slow.peam(PI[n], PI[n + 1], REF[n], REF[n + 1], 0.3, 0.8)),
    "simpo": (Simpo(2.0, 0.7), lambda n: slow.simpo(PI[n], PI[n + 1], 2.0, 0.7)),
}


@pytest.mark.parametrize("kind", PAIRED)
def test_a_loss_over_pairs_is_its_papers(kind: str) -> None:
    objective, twin = PAIRED[kind]
    found = objective.losses(Said(sums(PI), lines_of(), sums(REF)))
    assert found.tolist() == pytest.approx([twin(place) for place in (0, 2, 4)], rel=1e-6)


@pytest.mark.parametrize("kind", [*PAIRED, "kto"])
def test_its_gradient_is_that_of_the_numbers(kind: str) -> None:
    objective: Objective = Kto(0.3, 1.5, 0.5) if kind == "kto" else PAIRED[kind][0]
    rows = lines_of((1.0, 0.0, 1.0, 1.0, 0.0, 0.0))
    at, reference = sums(PI).requires_grad_(), sums(REF)
    assert torch.autograd.gradcheck(lambda x: objective.losses(Said(x, rows, reference, 0.2)), at, atol=1e-6)


def test_kto_is_its_papers_for_good_and_bad() -> None:
    worths, z0 = (1.0, 0.0, 1.0, 1.0, 0.0, 0.0), 0.35
    found = Kto(0.3, 1.5, 0.5).losses(Said(sums(PI), lines_of(worths), sums(REF), z0))
    expected = [
        slow.kto(pi, ref, bool(worth), z0, 0.3, 1.5 if worth else 0.5)
        for pi, ref, worth in zip(PI, REF, worths, strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_a_margin_is_asked_of_the_reward_beside_the_rows_own() -> None:
    scores, margins = (
        torch.tensor([2.0, 1.0, 0.0, 3.0, 1.0, 1.0], dtype=torch.float64),
        (0.5, 0.5, None, None, 2.0, 2.0),
    )
    found = Reward().losses(Said(scores, lines_of(margins)))
    expected = [slow.bradley_terry(*pair) for pair in ((2.0, 1.0, 0.5), (0.0, 3.0, 0.0), (1.0, 1.0, 2.0))]
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("objective", "value"),
    [
        (Dpo(0.1), math.log(2)),
        (Dpo(0.1, "sigmoid", 0.3), math.log(2)),
        (Dpo(0.1, "hinge"), 1.0),
        (Dpo(0.1, "ipo"), 25.0),
        (Kto(0.1), 0.5),
    ],
)
def test_where_policy_and_reference_are_equal_a_loss_has_its_closed_value(objective: Objective, value: float) -> None:
    said = Said(sums(PI), lines_of((1.0, 0.0, 1.0, 0.0, 1.0, 0.0)), sums(PI))
    assert objective.losses(said).tolist() == pytest.approx([value] * (6 // objective.lines), rel=1e-6)
    numbers = told(objective.names, objective.measures(said).flatten().tolist())
    assert {name: number for name, number in numbers.items() if name != "accuracy"} == dict.fromkeys(
        (name for name in objective.names if name != "accuracy"), 0.0
    )


def test_of_equal_models_peam_imitates_by_what_a_failure_is_worth_and_a_hopeless_one_teaches_next_to_nothing() -> None:
    reference = torch.tensor([3.0, 3.0, 2.0, 2.0 + math.log(3), 1.0, 300.0], dtype=torch.float64)
    said = Said(reference, lines_of(), reference)
    worths = [0.5, 0.25, 1e-6]
    imitation = [3.0 / 3, 2.0 / 1, 1.0 / 7]  # nats a token of corrections of 3, 1 and 7 tokens
    expected = [worth * (own + math.log(2)) for worth, own in zip(worths, imitation, strict=True)]
    assert Peam(0.1).losses(said).tolist() == pytest.approx(expected)
    numbers = told(Peam(0.1).names, Peam(0.1).measures(said).flatten().tolist())
    assert numbers["worth"] == pytest.approx(sum(worths) / 3) and numbers["margin"] == 0


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_a_task_is_due_where_what_other_pairs_say_of_one_left_out_is_right_whatever_the_scale(scale: float) -> None:
    def by_definition(margins: list[float]) -> bool:
        agreement = sum(d * (sum(margins) - d) for d in margins)
        return sum(margins) > 0 and agreement > 0

    cases = [[2.0, 1.0, 3.0], [2.0], [], [5.0, -5.0], [3.0, -2.9, 0.1], [-1.0, -2.0], [1.0, 1.0, -1.0, 1.0, 1.0]]
    found = [is_due([scale * each for each in case]) for case in cases]
    assert found == [True, False, False, False, False, False, True] == [by_definition(case) for case in cases]


def test_answers_as_likely_as_each_other_have_simpos_and_orpos_closed_values() -> None:
    same = Said(torch.tensor([3.0, 5.0, 1.0, 4.0, 7.0, 2.0]), lines_of())  # one nat a token, all of them
    assert Simpo(2.0, 0.7).losses(same).tolist() == pytest.approx([math.log1p(math.exp(0.7))] * 3)
    assert Orpo(0.4).losses(same).tolist() == pytest.approx([1 + 0.4 * math.log(2)] * 3)


def test_measures_count_who_is_right_and_by_how_much() -> None:
    said = Said(torch.tensor([1.0, 2.0, 5.0, 1.0, 0.0, 3.0]), lines_of(), torch.tensor([2.0, 2.0, 2.0, 2.0, 2.0, 2.0]))
    numbers = told(Dpo(0.5).names, Dpo(0.5).measures(said).flatten().tolist())
    assert numbers == pytest.approx(
        {"accuracy": 2 / 3, "margin": 0.5 * (1 - 4 + 3) / 3, "reward_chosen": 0.0, "reward_rejected": 0.0}
    )


def test_ratings_are_measured_apart_and_none_of_a_kind_is_no_number() -> None:
    said = Said(sums(PI), lines_of((1.0,) * 6), sums(REF), 0.1)
    numbers = told(Kto(0.5).names, Kto(0.5).measures(said).flatten().tolist())
    assert "reward_bad" not in numbers
    ratios = [slow.ratio(pi, ref) for pi, ref in zip(PI, REF, strict=True)]
    assert numbers["reward_good"] == pytest.approx(0.5 * sum(ratios) / 6)
    assert numbers["accuracy"] == pytest.approx(sum(each > 0.1 for each in ratios) / 6)


def test_odds_are_right_from_certain_to_impossible() -> None:
    log_probs = torch.tensor([-1e-5, -0.3, -0.7, -3.0, -80.0, -1e4], dtype=torch.float64, requires_grad=True)
    found = log_of_rest(log_probs)
    assert found.tolist() == pytest.approx([math.log(-math.expm1(x)) for x in log_probs.tolist()[:-1]] + [0.0])
    assert bool(torch.isfinite(torch.autograd.grad(found.sum(), log_probs)[0]).all())
    at_one = torch.zeros(2, requires_grad=True)
    assert bool(torch.isfinite(log_of_rest(at_one)).all())


def test_orpo_and_simpo_are_trls_own_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    means = torch.tensor([slow.mean(line) for line in PI])
    chosen, rejected = means.view(-1, 2).unbind(1)
    trainer: Any = SimpleNamespace(
        beta=0.4, accelerator=SimpleNamespace(device="cpu"), loss_type="simpo", simpo_gamma=0.7, label_smoothing=0.0
    )
    trainer.alpha = 0.0
    said = Said(sums(PI).float(), lines_of())
    ratios, rewards, *_ = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    assert torch.allclose(Orpo(0.4).losses(said), -chosen - ratios, atol=1e-5)
    assert torch.allclose(Orpo(0.4).rewards(said)[::2], rewards, atol=1e-5)
    losses, *_ = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    assert torch.allclose(Simpo(0.4, 0.7).losses(said), losses, atol=1e-5)
