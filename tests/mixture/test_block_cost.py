"""What a mixture of whole MLPs computes and keeps: as much as its slots ask for, whatever the experts."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from checked_mlps import HIDDEN, LINEARS, SHAPE, WIDE, config, inputs, layer, make
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def counted_products(model: nn.Module) -> Iterator[dict[str, list[int]]]:
    """The tokens that each call of a base linear multiplied."""
    seen: dict[str, list[int]] = {name: [] for name in LINEARS}
    handles = []
    for name in LINEARS:
        base = layer(model, name).get_base_layer()
        handles.append(
            base.register_forward_hook(
                lambda _, args, __, name=name: seen[name].append(args[0].flatten(0, -2).shape[0])
            )
        )
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (4, 2), (8, 2), (8, 8)])
def test_each_base_weight_is_multiplied_once_with_each_token_whatever_the_experts(experts: int, top_k: int) -> None:
    model = make(config(experts, top_k))
    with counted_products(model) as seen:
        model(inputs())
    assert seen == {name: [SHAPE[0] * SHAPE[1]] for name in LINEARS}


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_the_number_of_operations_does_not_depend_on_the_number_of_experts() -> None:
    calls = []
    for experts in (3, 8):
        model = make(config(experts, 2), dtype=torch.float32).train()
        with _Count() as count:
            model(inputs(torch.float32)).sum().backward()
        calls.append(count.calls)
    assert calls[0] == calls[1] > 50


def test_no_tensor_is_as_wide_as_the_mlp_for_every_expert() -> None:
    """Two slots of sixteen experts: the widest tensor has two entries of the intermediate width a token."""

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                Largest.entries = max(Largest.entries, out.untyped_storage().size() // out.element_size())
            return out

    model = make(config(16, 2, rank=1), dtype=torch.float32).train()
    x = torch.randn(4, 50, HIDDEN, requires_grad=True)
    with Largest():
        model(x).sum().backward()
    assert Largest.entries == 2 * 4 * 50 * WIDE


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes kept for the backward pass, beside parameters and x."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(kept.values())


def test_what_is_kept_is_four_entries_of_the_width_for_each_slot_and_a_little_rank_space() -> None:
    x = torch.randn(4, 64, HIDDEN, requires_grad=True)
    for top_k in (1, 2):
        model = make(config(8, top_k, rank=1), dtype=torch.float32)
        per_token = kept_bytes(model, x) / (4 * 64 * 4)
        assert 0 < per_token - 4 * top_k * WIDE < 3 * (3 + 4 * top_k) * 8
