"""The orthogonality penalty against the double loop over pairs, and its price."""

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qd2mora.mixture import penalties
from qd2mora.mixture.penalties import groups_of, pairwise_overlap


def banks(num_modules: int, num_experts: int, scale: float = 1.0) -> list[nn.Parameter]:
    torch.manual_seed(num_modules * 100 + num_experts)
    return [nn.Parameter(scale * torch.randn(num_experts, 3, 11)) for _ in range(num_modules)]


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_value_and_gradient_equal_the_double_loop(scale: float) -> None:
    mixed = [*banks(2, 4, scale), *banks(3, 2, scale), nn.Parameter(torch.randn(1, 5, 5))]
    copies = [bank.detach().double().requires_grad_() for bank in mixed]
    ours, wanted = pairwise_overlap(mixed), reference.overlap(copies)
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=0)
    ours.backward()
    wanted.backward()
    for bank, copy in zip(mixed[:-1], copies[:-1], strict=True):
        assert (bank.grad.double() - copy.grad).norm() <= 1e-4 * copy.grad.norm()


def test_zero_experts_give_zero_and_never_nan() -> None:
    for zeros in (slice(None), slice(1, 2)):
        bank = banks(1, 3)[0]
        bank.data[zeros] = 0
        value = pairwise_overlap([bank])
        value.backward()
        torch.testing.assert_close(value.detach().double(), reference.overlap([bank.detach().double()]))
        assert torch.isfinite(bank.grad).all()


def test_it_is_taken_in_groups_of_one_shape_that_hold_a_limit_of_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = [*banks(7, 3), nn.Parameter(torch.randn(2, 9, 50)), *banks(2, 2), nn.Parameter(torch.randn(1, 5, 5))]
    whole = pairwise_overlap(mixed)
    wanted = torch.autograd.grad(whole, mixed[:-1])
    monkeypatch.setattr(penalties, "AT_ONCE", 300)
    groups = groups_of(mixed)
    assert [[tuple(bank.shape) for bank in group] for group in groups] == [
        [(2, 3, 11)] * 2, [(2, 9, 50)], *([(3, 3, 11)] * number for number in (3, 3, 1))
    ]  # fmt: skip
    torch.testing.assert_close(sum(pairwise_overlap(group) for group in groups), whole)
    found = {id(bank): torch.autograd.grad(pairwise_overlap(group), group)[0] for group in groups for bank in group[:1]}
    for bank, gradient in zip(mixed, wanted, strict=False):
        torch.testing.assert_close(found.get(id(bank), gradient), gradient)


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.unsqueeze.default and func is not torch.ops.aten.select.int:
            self.calls += 1
        return func(*args, **(kwargs or {}))


def operations(num_modules: int, num_experts: int) -> int:
    tensors: list[Tensor] = [bank.detach() for bank in banks(num_modules, num_experts)]
    with _Count() as count:
        pairwise_overlap(tensors)
    return count.calls


def test_the_number_of_operations_depends_on_neither_experts_nor_modules() -> None:
    price = operations(2, 2)
    assert operations(2, 8) == price
    assert price == operations(2, 3)
    # Stacking takes a view of each bank first; no other operation is added by a module.
    assert operations(12, 2) - price <= 10


def test_descending_it_drives_experts_apart() -> None:
    common = torch.randn(1, 4, 20)
    bank = nn.Parameter(common + 0.1 * torch.randn(4, 4, 20))
    optimizer = torch.optim.Adam([bank], lr=0.02)
    before = float(pairwise_overlap([bank]).detach())
    for _ in range(100):
        optimizer.zero_grad()
        pairwise_overlap([bank]).backward()
        optimizer.step()
    assert float(pairwise_overlap([bank]).detach()) < 0.2 * before
