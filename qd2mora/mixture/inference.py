"""A shorter way through adapted linears while text is written: what is the same at every token is made once.

Between two tokens of an answer an adapter's tensors do not change, so their rows, joined, and their columns, turned and
joined, are kept from one to the next. Linears that read the same x (q, k and v; gate and up) are taken together: one
product over x and one step in rank space for all of them. At one token a row, what a linear does beside its two thin
products would be dearer than the products.

Gates may be kept for several tokens (CMLoRA's caching, arXiv 2502.04923, for gates): then each linear decides at the
first token of an answer, keeps that for the next ones, and decides anew. At one token it is exact.

Deviation from the form of `fused`: none in exact arithmetic; in floating point, products of another shape may add in
another order.

Shapes: D d_in, O d_out, F all rows that read x, P all ranks of the up banks, S linears that read the same x, M
down experts, N up experts, R rank of one expert.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from qd2mora.mixture import rank_space
from qd2mora.mixture.gating import is_given
from qd2mora.mixture.layer import MixtureLinear, mixture_layers
from qd2mora.mixture.spec import LinearSpec
from qd2mora.routed.gate import Gate
from qd2mora.routed.ops import wide
from qd2mora.routed.routers import Gating, soft

Step = Callable[[Tensor, Tensor], Tensor]
"""Makes v (T, S, P), at least float32, of u (T, F) and of x (..., D), where the T tokens come from."""


@contextmanager
def shortcuts(model: nn.Module, gates_every: int = 1) -> Iterator[None]:
    """Have adapted linears take the shorter way while the block runs; no adapter may change in it.

    They keep a copy of the adapter's matrices in the dtype of the products until it ends. `gates_every`: tokens of an
    answer that gates are decided for at once; rows must stay what they are until it ends.
    """
    found = mixture_layers(model)
    if any(layer.shortcut is not None for layer in found.values()):
        yield  # whoever took them before gives them back
        return
    shared: dict[tuple[object, ...], _SameInput] = {}
    for name, layer in found.items():
        adapter = _the_one_adapter(layer)
        if adapter is not None:
            parent, spec = name.rpartition(".")[0], layer.mixture_spec[adapter]
            # Plain steps take several linears at once where these are alike; others stay by themselves.
            key = (parent, layer.in_features, spec.step) if _is_plain(spec) and gates_every == 1 else (name,)
            layer.shortcut = _Shortcut(layer, shared.setdefault(key, _SameInput(adapter, gates_every)))
    try:
        yield
    finally:
        for layer in found.values():
            layer.shortcut = None


def _the_one_adapter(layer: MixtureLinear) -> str | None:
    names = [name for name in layer.active_adapters if name in layer.mixture_spec]
    # A block's output may not be added into, and slots of whole MLPs are an axis more; magnitudes scale the base.
    if len(names) != 1 or not isinstance(layer.get_base_layer(), nn.Linear) or layer.mixes_whole_mlps(names[0]):
        return None
    if "mixture_magnitude" in layer.mixture_spec[names[0]].shapes:
        return None
    return names[0]


class _SameInput:
    """Linears of one parent that may read the same x, and what the first of them made of the last x."""

    def __init__(self, adapter: str, gates_every: int) -> None:
        self.adapter, self.layers, self.gates_every = adapter, list[MixtureLinear](), gates_every
        self.dtype: torch.dtype | None = None
        """Of the linears' outputs, and of what is kept for them."""
        self.columns: list[Tensor] = []
        """(P, O) of each linear."""
        self._rows, self._step = torch.empty(0), cast(Step, None)
        self._x, self._version, self._v = torch.empty(0), 0, list[Tensor]()

    def prepare(self, dtype: torch.dtype) -> None:
        """Make what the linears multiply with, in the dtype of their outputs."""
        spec = self.layers[0].mixture_spec[self.adapter]
        parts = [layer.linear_rows(self.adapter).split(_widths(spec)) for layer in self.layers]
        # Banks of all linears, then their routers, so that each kind is one view of the product.
        self._rows = torch.cat([part for of_kind in zip(*parts, strict=True) for part in of_kind]).to(dtype)
        self.columns = [layer.columns(self.adapter).to(dtype).T.contiguous() for layer in self.layers]
        if self.gates_every > 1:
            self._step = _KeptGates(self.layers[0], self.adapter, self.gates_every)
        elif _is_plain(spec):
            self._step = _plain_chain(spec, len(self.layers), self._routers_up())
        else:
            self._step = self._any_step(spec)
        self.dtype = dtype

    def v_of(self, x: Tensor, number: int) -> Tensor:
        """Return v of one of the linears, (T, P), made for all of them where x is new."""
        # The very tensor, unchanged since: whoever has another x gets a v of its own.
        if self._x is not x or self._version != x._version:
            x_TD = x.reshape(-1, x.shape[-1])
            # A cast to the dtype that is there is a call all the same, and these are few tokens.
            if x.dtype is not self.dtype:
                x_TD = x_TD.to(self.dtype)
            u_TF = F.linear(x_TD, self._rows)
            v_TSP = self._step(u_TF, x)
            if v_TSP.dtype is not self.dtype:
                v_TSP = v_TSP.to(self.dtype)
            self._x, self._version, self._v = x, x._version, list(v_TSP.unbind(1))
        return self._v[number]

    def _routers_up(self) -> list[Tensor]:
        small = [layer.own_small(self.adapter) for layer in self.layers]
        return [own["router_up"] for own in small if "router_up" in own]

    def _any_step(self, spec: LinearSpec) -> Step:
        layer, name = self.layers[0], self.adapter
        own, brings = layer.own_small(name), any(is_given(gate) for _, gate in spec.step.gates)

        def step(u_TF: Tensor, x: Tensor) -> Tensor:
            small = own | layer.given_small(x, name) if brings else own
            v = rank_space.mix(spec.step, u_TF.view(*x.shape[:-1], -1), small, None)
            return v.reshape(len(u_TF), 1, -1)

        return step


class _KeptGates:
    """The step of one linear whose gates are decided for several tokens of an answer at once."""

    def __init__(self, layer: MixtureLinear, adapter: str, every: int) -> None:
        self.layer, self.adapter, self.every = layer, adapter, every
        self.own, self.step = layer.own_small(adapter), layer.mixture_spec[adapter].step
        self._gatings: dict[str, Gating] = {}
        self._left = 0

    def __call__(self, u_TF: Tensor, x: Tensor) -> Tensor:
        u = wide(u_TF).view(*x.shape[:-1], -1)
        # A prompt's tokens have gates of their own, and may come in several passes of one cache.
        is_answer = self.layer.routing.is_decoding and x.dim() == 3 and x.shape[1] == 1
        if is_answer and self._left:
            self._left -= 1
            v = self.step.apply(u, self.own, self._gatings)
        else:
            small = self.own | self.layer.given_small(x, self.adapter)
            v, self._gatings = self.step.route(u, small)
            self._left = self.every - 1 if is_answer else 0
        return v.reshape(len(u_TF), 1, -1)


class _Shortcut:
    """One linear's way."""

    def __init__(self, layer: MixtureLinear, same_input: _SameInput) -> None:
        self.layer, self.same_input, self.number = layer, same_input, len(same_input.layers)
        same_input.layers.append(layer)
        # Modules and properties are looked up once: at one token a row each costs as much as a product.
        adapter = same_input.adapter
        self.base, self.scaling, self.d_out = layer.base_layer, layer.scaling(adapter), layer.out_features
        self.has_base_scale = "mixture_base_scale" in layer.tensors(adapter)
        self.spec, self.active = layer.mixture_spec[adapter], layer._active_adapter

    def __call__(self, x: Tensor) -> Tensor | None:
        layer, same_input = self.layer, self.same_input
        # Another adapter, or gates that somebody weakens for a while, are not what was prepared.
        if layer._active_adapter != self.active or layer.mixture_spec.get(same_input.adapter) is not self.spec:
            return None
        if layer._disable_adapters or layer.merged_adapters or layer.watchers or layer.static_updates:
            return None
        if torch.is_grad_enabled():
            return None
        y: Tensor = self.base(x)
        if self.has_base_scale:
            y = layer.base_scaled(y, same_input.adapter)
        if y.dtype is not same_input.dtype:
            same_input.prepare(y.dtype)
        v = same_input.v_of(x, self.number)
        y.view(-1, self.d_out).addmm_(v, same_input.columns[self.number], alpha=self.scaling)
        return y


def _is_plain(spec: LinearSpec) -> bool:
    """Tell whether a step is a chain whose gates are linear, without bias, and count every expert by its softmax."""
    step, gates = spec.step, dict(spec.step.gates)
    is_chain = step.pairing == "chain" and step.core == "none" and not step.shared and gates.keys() <= {"down", "up"}
    has_more = any(f"mixture_{what}_{role}" in spec.shapes for what in ("bias", "out", "select_bias") for role in gates)
    return is_chain and not has_more and all(map(_is_softmax, gates.values()))


def _is_softmax(gate: Gate) -> bool:
    reads_token = not is_given(gate) and gate.input != "self"
    return reads_token and gate.score == "linear" and gate.select == "all" and gate.weight in ("softmax", "dense")


def _widths(spec: LinearSpec) -> list[int]:
    """Return how many rows read x: of banks, then of each router."""
    return [spec.step.width_down + spec.step.shared, *(rows for _, rows in spec.step.router_rows)]


def _plain_chain(spec: LinearSpec, num: int, routers_up: list[Tensor]) -> Step:
    """Return what `RankStep.mix` does, for `num` linears with the same step; `routers_up`: (N, R) of each, or none."""
    gates, (banks, *_) = dict(spec.step.gates), _widths(spec)
    down, up, M = gates.get("down"), gates.get("up"), len(spec.step.ranks_down)
    rank = banks // M
    # One product gives all linears' scores: each router reads its own linear's z.
    router = wide(torch.block_diag(*routers_up)) if routers_up else None

    def mix(u_TF: Tensor, x: Tensor) -> Tensor:
        u = u_TF if u_TF.dtype is torch.float32 else wide(u_TF)
        T, S = u.shape[0], num
        start = S * banks
        z = u[:, :start]
        if down is not None:
            alpha = soft(u[:, start : start + S * M].view(T, S, M), down.temperature)
            # One small product in the place of a product and a sum: at one token each call counts.
            z = torch.bmm(alpha.view(T * S, 1, M), z.reshape(T * S, M, rank))
            start += S * M
        z = z.view(T, S, -1)
        if up is None:
            return z
        scores = u[:, start:] if router is None else F.linear(z.reshape(T, -1), router)
        return (soft(scores.view(T, S, -1), up.temperature).unsqueeze(-1) * z.unsqueeze(2)).view(T, S, -1)

    return mix


__all__ = ["shortcuts"]
