"""Measures of routers and experts against slow, obvious forms in float64."""

import math

import pytest
import torch

from qd2mora.inspection.experts import effective_rank, gram, measure_bank, project
from qd2mora.inspection.measures import measure, mutual_information, token_sums


def routed(seed: int = 0, num_tasks: int = 3, num_experts: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return gates (B, n, E) that do not sum to one, what is counted (B, n), and tasks (B,) of which one is absent."""
    generator = torch.Generator().manual_seed(seed)
    gates = torch.rand(5, 7, num_experts, generator=generator, dtype=torch.float64) + 0.01
    counted = (torch.rand(5, 7, generator=generator) < 0.7).double()
    return gates, counted, torch.tensor([0, 1, 1, 0, 0])


def summed(gates: torch.Tensor, chosen: torch.Tensor | None, counted: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
    by_row = token_sums(gates, chosen, counted)
    return torch.stack([by_row[task == number].sum(0) for number in range(3)])


def test_dense_gates_are_measured_as_token_by_token() -> None:
    gates, counted, task = routed()
    found = measure(summed(gates, None, counted, task), is_sparse=False)
    g: dict[int, list[list[float]]] = {0: [], 1: []}
    for row in range(5):
        for token in range(7):
            if counted[row, token]:
                one = gates[row, token].tolist()
                g[int(task[row])].append([value / sum(one) for value in one])
    assert found.tokens == [len(g[0]), len(g[1]), 0]
    assert found.usage[2] is None
    usage = {k: [sum(column) / len(rows) for column in zip(*rows, strict=True)] for k, rows in g.items()}
    for number in (0, 1):
        assert found.usage[number] == pytest.approx(usage[number])
    load = [(one + two) / 2 for one, two in zip(usage[0], usage[1], strict=True)]
    assert found.load == pytest.approx(load)

    def entropy(shares: list[float]) -> float:
        return -sum(share * math.log(share) for share in shares if share > 0)

    by_task = [sum(map(entropy, rows)) / len(rows) for rows in g.values()]
    assert found.entropy == pytest.approx(sum(by_task) / 2 / math.log(4))
    assert found.entropy_of_mean == pytest.approx(entropy(load) / math.log(4))
    assert found.effective_experts == pytest.approx(math.exp(entropy(load)))
    sizes = [sum(1 / sum(share * share for share in one) for one in rows) / len(rows) for rows in g.values()]
    assert found.effective_per_token == pytest.approx(sum(sizes) / 2)
    assert (found.max_load, found.min_load) == pytest.approx((4 * max(load), 4 * min(load)))
    joint = [[share / 2 for share in usage[k]] for k in (0, 1)]
    information = sum(p * math.log(p / (0.5 * load[e])) for row in joint for e, p in enumerate(row))
    assert found.mutual_information_of_weights == pytest.approx(information)


def test_sparse_gates_share_a_token_among_what_was_chosen() -> None:
    gates, counted, task = routed(1)
    chosen = torch.zeros_like(gates).scatter(-1, gates.topk(2, -1).indices, 1.0)
    found = measure(summed(gates * chosen, chosen, counted, task), is_sparse=True, at_once=2)
    seen = [chosen[task == number][counted[task == number] > 0].mean(0) / 2 for number in (0, 1)]
    load = (seen[0] + seen[1]) / 2
    assert found.load == pytest.approx(load.tolist())
    assert found.top_share == pytest.approx(float(load.topk(2).values.sum()))
    assert found.mutual_information == pytest.approx(mutual_information(torch.stack(seen)))


def test_information_is_all_where_each_task_has_its_expert_and_none_where_tasks_are_alike() -> None:
    assert mutual_information(torch.eye(3, dtype=torch.float64)) == pytest.approx(math.log(3))
    assert mutual_information(torch.rand(1, 4, dtype=torch.float64).expand(3, 4)) == pytest.approx(0, abs=1e-12)


def test_an_expert_that_gets_nothing_is_dead_and_one_that_gets_all_is_the_whole_load() -> None:
    gates = torch.tensor([[[0.998, 0.001, 0.0005, 0.0005]]], dtype=torch.float64)
    found = measure(token_sums(gates, None, torch.ones(1, 1, dtype=torch.float64)), is_sparse=False)
    assert found.dead == [1, 2, 3]
    assert found.top_share == pytest.approx(0.998)
    assert found.effective_experts < 1.02


def test_a_bank_is_measured_as_by_qr_and_svd() -> None:
    torch.manual_seed(0)
    ranks, bank = (3, 3, 3), torch.randn(3, 3, 50, dtype=torch.float64)
    bank[2] = torch.randn(3, 3, dtype=torch.float64) @ bank[0]  # another basis of the same subspace
    found = measure_bank(bank.flatten(0, 1), ranks)
    bases = [torch.linalg.qr(expert.T).Q for expert in bank]
    for i in range(3):
        for j in range(3):
            flat = [bank[place].flatten() for place in (i, j)]
            cosine = abs(float(flat[0] @ flat[1])) / float(flat[0].norm() * flat[1].norm())
            assert found.cosines[i][j] == pytest.approx(cosine, rel=1e-5)
            values = torch.linalg.svdvals(bases[i].T @ bases[j])
            assert found.overlaps[i][j] == pytest.approx(float(values.square().mean()), rel=1e-5)
    assert found.overlaps[0][2] == pytest.approx(1)
    assert found.cosines[0][2] < 0.9
    values = torch.linalg.svdvals(bank.flatten(0, 1)).square()
    assert found.effective_rank == pytest.approx(effective_rank(torch.diag(values)))
    assert found.norms == pytest.approx([float(expert.norm()) for expert in bank])


def test_experts_that_are_zero_have_no_angle_and_no_place() -> None:
    found = measure_bank(torch.zeros(6, 20), (2, 2, 2))
    assert (found.mean_cosine, found.mean_overlap, found.mean_angle, found.effective_rank) == (0, None, None, 0)
    assert project([torch.zeros(2, 3)] * 4) == ([None] * 4, [])


def test_the_picture_is_that_of_a_singular_value_decomposition() -> None:
    torch.manual_seed(0)
    experts = [torch.randn(2, 11) for _ in range(6)]
    places, explained = project(experts)
    unit = torch.stack([expert.flatten().double() / expert.double().norm() for expert in experts])
    centered = unit - unit.mean(0)
    _, values, axes = torch.linalg.svd(centered, full_matrices=False)
    wanted = (centered @ axes[:2].T).abs()
    torch.testing.assert_close(torch.tensor(places, dtype=torch.float64).abs(), wanted, rtol=1e-4, atol=1e-6)
    shares = values.square() / values.square().sum()
    assert explained == pytest.approx(shares[:2].tolist(), rel=1e-4)


def test_a_gram_matrix_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(4, 37)
    whole = gram(rows)
    monkeypatch.setattr("qd2mora.inspection.experts.CHUNK", 5)
    torch.testing.assert_close(gram(rows), whole)
