"""The fast form as operators of torch.library, so that torch.compile takes a layer whole, without a graph break.

`forward` and `backward` of `fused` run inside the operators as they do under eager autograd; the compiler sees tensors,
names and a number that stands for the rest. Keys of dropout and noise are drawn inside the forward operator
and come out as a tensor, for the backward operator to draw the same numbers.

Deviation from eager: what watches the gates (penalties, load counts) reads the routing as it is when the backward pass
runs, where eager keeps that of the forward pass; they are the same unless another pass runs in between.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from qd2mora.mixture import frozen, fused
from qd2mora.mixture.draws import Draws, Rows
from qd2mora.mixture.fused import FusedCall, Observe


@dataclass(frozen=True, eq=False)
class TracedAdapter:
    """One adapter of one linear in one mode: its call, whether that is random, what makes draws, observer and watch.

    `layer` is the key of the linear's draws.
    """

    call: FusedCall
    is_random: bool
    layer: int
    draws: Callable[[], Draws | None]
    observer: Callable[[Tensor], Observe | None]
    pooling: Callable[[FusedCall, Tensor, dict[str, Tensor]], Callable[[Tensor, Tensor], None] | None]


# The compiler keeps a number in its graph as a constant; a layer's calls are found again by it.
_numbers = count()
_adapters: WeakValueDictionary[int, TracedAdapter] = WeakValueDictionary()
# A layer keeps its adapters alive, without knowing: a copied or saved layer must not take the numbers along.
_adapters_of_layer: WeakKeyDictionary[nn.Module, list[TracedAdapter]] = WeakKeyDictionary()


def register(layer: nn.Module, adapter: TracedAdapter) -> int:
    """Keep an adapter for as long as its layer lives; return its number. Runs while a layer is traced."""
    number = next(_numbers)
    _adapters[number] = adapter
    _adapters_of_layer.setdefault(layer, []).append(adapter)
    return number


def mixture(number: int, y: Tensor | None, x: Tensor, base: list[Tensor], tensors: list[Tensor]) -> Tensor:
    """Return what `fused.mixed_linear` does, or with y what `add_mixture` does, of the numbered adapter's call."""
    needs = [tensor.requires_grad for tensor in (x, *tensors)]
    out, _, _ = _forward(y, x, base, tensors, number, needs)
    return out


# The tag keeps the compiler from joining two such calls, or running one again: they draw numbers.
@torch.library.custom_op("qd2mora::mixture_forward", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _forward(
    y: Tensor | None, x: Tensor, base: Sequence[Tensor], tensors: Sequence[Tensor], number: int, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, u, and the keys of the draws. `needs`: whether x and each of the tensors needs a gradient."""
    adapter = _adapters[number]
    draws = adapter.draws()
    call = replace(adapter.call, draws=draws)
    small = dict(zip(call.names, tensors[call.num_downs + call.num_ups :], strict=True))
    call = replace(call, watch=adapter.pooling(call, x, small))
    if y is None:
        assert call.layout is not None
        out = frozen.product(call.layout, list(base), x)
    else:
        # An operator that says it changes no input must not: eager's adding in place costs a copy here.
        out = y.clone(memory_format=torch.contiguous_format)
    u = fused.forward(call, out, x, tensors)
    return out, u, _keys_of(draws, _num_keys(x))


@_forward.register_fake
def _(
    y: Tensor | None, x: Tensor, base: Sequence[Tensor], tensors: Sequence[Tensor], number: int, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    adapter = _adapters[number]
    if y is None:
        assert adapter.call.layout is not None
        out = x.new_empty(*x.shape[:-1], adapter.call.layout.shape[0])
    else:
        out = torch.empty_like(y, memory_format=torch.contiguous_format)
    u = out.new_empty(*x.shape[:-1], adapter.call.step.features)
    return out, u, torch.empty((4, adapter.is_random * _num_keys(x)), dtype=torch.int64)


@torch.library.custom_op("qd2mora::mixture_backward", mutates_args=())
def _backward(
    dy: Tensor,
    saved: Sequence[Tensor],
    base: Sequence[Tensor],
    tensors: Sequence[Tensor],
    number: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients of x and the tensors, empty ones where none is needed; `saved` are x, u and the keys."""
    adapter, (x, u, keys) = _adapters[number], saved
    call = replace(adapter.call, draws=_draws_of(keys, adapter.layer), observe=adapter.observer(x))
    # `through` differentiates the step in rank space, gates and penalties included.
    with _autograd_inside():
        dx, grads = fused.backward(call, dy.contiguous(), x, u, list(base), tensors, needs)
    return [dy.new_empty(0) if grad is None else _alone(grad) for grad in (dx, *grads)]


@_backward.register_fake
def _(
    dy: Tensor,
    saved: Sequence[Tensor],
    base: Sequence[Tensor],
    tensors: Sequence[Tensor],
    number: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    grads = []
    for of, need in zip((saved[0], *tensors), needs, strict=True):
        grads.append(torch.empty_like(of, memory_format=torch.contiguous_format) if need else dy.new_empty(0))
    return grads


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    y, x, base, tensors, number, needs = inputs
    _, u, keys = output
    ctx.save_for_backward(x, u, keys, *base, *tensors)
    ctx.has_y, ctx.num_base, ctx.number, ctx.needs = y is not None, len(base), number, needs


def _gradients(ctx, dy: Tensor, du: Tensor | None, dkeys: Tensor | None):  # type: ignore[no-untyped-def]
    """Return the gradients of y, x, the base's tensors, the adapter's tensors, and nothing for the rest."""
    x, u, keys, *rest = ctx.saved_tensors
    base, tensors = rest[: ctx.num_base], rest[ctx.num_base :]
    found = _backward(dy, [x, u, keys], base, tensors, ctx.number, ctx.needs)
    dx, *grads = [grad if need else None for grad, need in zip(found, ctx.needs, strict=True)]
    return dy if ctx.has_y else None, dx, [None] * len(base), grads, None, None


_forward.register_autograd(_gradients, setup_context=_save_for_backward)


def _alone(grad: Tensor) -> Tensor:
    """Return a tensor that owns its memory: what an operator returns may not share any."""
    return grad.contiguous() if grad.untyped_storage().nbytes() == grad.nbytes else grad.clone()


@contextmanager
def _autograd_inside() -> Iterator[None]:
    """Let the step in rank space be differentiated inside an operator, where torch has autograd switched off."""
    # There is no public way: torch.func.vjp fails there under torch.compile (torch 2.13).
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


_UNUSED, _SINGLE = -2, -1


def _num_keys(x: Tensor) -> int:
    """Return how many keys there may be: how many rows share a line is not told to the compiler, and none is empty."""
    return x.numel() // x.shape[-1] + 1


def _keys_of(draws: Draws | None, most: int) -> Tensor:
    """Return keys, lengths, and lines and starts of packed rows, (4, most) int64; the rest is unused.

    A single key has the length -1.
    """
    if draws is None:
        return torch.empty((4, 0), dtype=torch.int64)
    rows, table = draws.rows, torch.full((4, most), _UNUSED)
    lengths = rows.lengths or (_SINGLE,)
    given = torch.tensor([rows.keys[: len(lengths)], lengths, *zip(*rows.places or (), strict=True)])
    table[: given.shape[0], : given.shape[1]] = given
    return table


def _draws_of(keys: Tensor, layer: int) -> Draws | None:
    if not keys.numel():
        return None
    key, lengths, *places = keys[:, keys[1] != _UNUSED].tolist()
    if lengths[0] == _SINGLE:
        return Draws(Rows((key[0],)))
    is_packed = places[0][0] != _UNUSED
    packed = tuple(zip(*places, strict=True)) if is_packed else None
    return Draws(Rows(tuple(key), tuple(lengths), packed), layer)


__all__ = ["TracedAdapter", "mixture", "register"]
