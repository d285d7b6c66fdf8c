"""Experts that are whole MLPs, mixed after the nonlinearity, at the price of one pass through the frozen weights.

y = sum over chosen e of g_e W2_e (act(W1_e x) * W3_e x), W_e = W + s B_e A_e (MixLoRA, arXiv 2404.15159; github
TUDB-Labs/MixLoRA). A token's k chosen experts are its slots, a leading axis K that the MLP's own forward carries along:

- gate_proj and up_proj run their base once, and for all slots a mask in rank space and one product: W x + s B m_k A x;
- the MLP applies its own nonlinearity to (K, ..., d_ff), k of them, never one for each expert;
- down_proj takes the weighted sum over slots first, because W2 is linear: sum_k g_k W2 h_k = W2 (sum_k g_k h_k). So
  the base runs once and on T tokens, not on k T; the low-rank terms sum_k g_k B m_k A h_k are summed in rank space too.

Nothing is installed on the MLP. Its router belongs to the first of its adapted linears, which says what the slots are.
Where that is down_proj itself there is nothing to carry along, and where a bank has one expert nothing to choose: both
are the plain layer, exactly. Rank space and the mean over slots accumulate in float32, or float64 where x is.

Saved for the backward pass in an MLP, an entry of the intermediate width a token: 4 k in the dtype of x (what the
activation, the product, its second factor and down_proj read) beside 4 for one LoRA, or 3 k beside 3 where a run keeps
no activated gate (memory.lean); a dropped input once more where there is dropout, masks never. In rank space, a rank of
a bank a token, in all three linears together: 24 k + 2 bytes in 16 bits, 28 k + 4 in float32 (measured).

Experts that are DoRAs (`magnitude`) scale the rows of all that comes out of their weight, the base's part too: gate and
up scale each slot's own, and down_proj runs its base on k T tokens, because a scale of its rows keeps slots apart.
Saved besides, in the dtype of x: what is scaled, k in gate and up, and two k of the hidden width in down_proj.

Deviations: one dropout mask a linear by default, one for each slot with `dropout_per_expert`, where each published
expert draws its own; every router is balanced by itself (see `balance`).

Shapes: K slots, ... leading axes (rows, tokens), E experts, D d_in, O d_out, Q ranks of a bank with the shared
expert's.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qd2mora.errors import InputRefused
from qd2mora.mixture import magnitude
from qd2mora.mixture.config import MixtureConfig
from qd2mora.mixture.gating import given_logits
from qd2mora.mixture.layer import MixtureLinear
from qd2mora.mixture.method import MLP
from qd2mora.mixture.observer import Observer, pool
from qd2mora.mixture.phases import gate_in
from qd2mora.mixture.slots import MLPGate, Observed, SlotDropout, Slots
from qd2mora.mixture.spec import Place
from qd2mora.routed import ops
from qd2mora.routed.text import Key

LAST = "down_proj"


class MixtureMLPLinear(MixtureLinear):
    """A linear of an MLP: what `MixtureLinear` is, and a part of whole MLPs where an adapter mixes those."""

    def mixes_whole_mlps(self, adapter_name: str) -> bool:
        """Tell whether this adapter has its experts in whole MLPs, which this linear is part of."""
        if adapter_name not in self.mixture_spec:
            return False
        config, spec = self.mixture_config[adapter_name], self.mixture_spec[adapter_name]
        is_part = config.row.placement == "mlp" and spec.place.kind in MLP and spec.gate("down") is not None
        return is_part and not (spec.place.kind == LAST and spec.place.owns_router)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return (K, ..., O) of x (..., D) in an MLP's first linears, (..., O) of (K, ..., D) in its last.

        Where no active adapter mixes whole MLPs, or a static one stands in for it, what `MixtureLinear` returns. Raises
        ValueError where another adapter is active beside it: what the two should mean together is not defined.
        """
        name = self._whole_adapter()
        if name is None:
            return super().forward(x, *args, **kwargs)
        if self.mixture_spec[name].place.kind == LAST:
            return self._close(x, name)
        return self._open(x, name)

    def _whole_adapter(self) -> str | None:
        if self.runs_base_alone:
            return None
        names = [name for name in self.active_adapters if name in self.mixture_spec]
        found = [name for name in names if name not in self.static_updates and self.mixes_whole_mlps(name)]
        if not found:
            return None
        # Its slots are an axis that another adapter's linears would not know.
        if len(names) > 1:
            others = ", ".join(name for name in names if name != found[0])
            raise ValueError(f"adapter '{found[0]}' mixes whole MLPs and runs alone on them; deactivate {others}")
        return found[0]

    def _open(self, x: Tensor, name: str) -> Tensor:
        """Run the base once, and in rank space once for all slots: W x + s B m_k A x. The router's owner decides."""
        spec = self.mixture_spec[name]
        if spec.place.owns_router:
            tensors = self.tensors(name)
            gate = spec.gate("down")
            assert gate is not None
            logits = given_logits("down", x, tensors, self.routing, name, spec)
            if self.training:
                gate = gate_in(gate, self.routing.phase, spec.counts["down"], spec.place.height)
            of_mlp = MLPGate(gate, tensors.get("mixture_select_bias_down"))
            self.routing.slots[_key(spec.place, name)] = of_mlp.slots(logits, x.shape[:-1])
            if self.training and spec.pools and x.dim() == 3:
                with torch.no_grad():
                    pool(spec, self.routing, name, x, {"down": of_mlp.gating(logits)})
        # The base reads the token alone and so runs once; slots differ in rank space, and in what is added to it.
        y = self.base_layer(x)
        slots = self._slots(name)
        u = self._slot_features(x, name, y.dtype, slots)
        stacked = ops.up_product(slots.ranks(spec.step) * u, self.columns(name), spec.scaling, y.dtype) + y
        stacked = self.magnified(stacked, slots.which, name)
        if not (spec.place.owns_router and self.training):
            return stacked
        observer = Observer.of(spec, self.routing, name, x)
        if observer is None:
            return stacked
        # On the output and not on the gates, whose gradient may be none (weight `one`): penalties are always added.
        observed: Tensor = Observed.apply(stacked, logits, of_mlp.gating, observer)
        return observed

    def _close(self, h: Tensor, name: str) -> Tensor:
        """Sum over slots before the base: sum_k g_k W2 h_k = W2 (sum_k g_k h_k), because W2 is linear."""
        if magnitude.NAME in self.tensors(name):
            return self._close_magnified(h, name)
        spec, slots = self.mixture_spec[name], self._last_slots(name)
        y: Tensor = self.base_layer(slots.mean(h))
        linear = self.get_base_layer()
        assert isinstance(linear, nn.Linear)
        if linear.bias is not None and not slots.is_mean:
            # The base added its bias once; every slot has it, as often as the slot counts.
            y = y + ((slots.weight.sum(0) - 1).unsqueeze(-1) * linear.bias).to(y.dtype)
        v = slots.mixed(spec.step, self._slot_features(h, name, y.dtype, slots))
        return y + ops.up_product(v, self.columns(name), spec.scaling, y.dtype)

    def _close_magnified(self, h: Tensor, name: str) -> Tensor:
        """Run the base in every slot, and mix after each expert's own scale of its rows: sum_k g_k c_k (W_k h_k)."""
        spec, slots = self.mixture_spec[name], self._last_slots(name)
        y: Tensor = self.base_layer(h)
        u = self._slot_features(h, name, y.dtype, slots)
        stacked = ops.up_product(slots.ranks(spec.step) * u, self.columns(name), spec.scaling, y.dtype) + y
        return slots.mean(self.magnified(stacked, slots.which, name))

    def _slot_features(self, x: Tensor, name: str, dtype: torch.dtype, slots: Slots) -> Tensor:
        """Return A x of every rank, (..., Q) or (K, ..., Q), at least float32; x dropped in training."""
        # In the dtype of the base's output, as in the plain layer: u rounds here as it does there.
        config, x = self.mixture_config[name], x.to(dtype)
        if self.training and config.dropout > 0:
            masks = 1
            if config.dropout_per_expert:
                masks = len(slots.weight)
            dropout = SlotDropout(config.dropout, masks, self.routing.draws(self.layer_key))
            x = dropout.apply(x, slots.weight.dim())
        return ops.wide(ops.features(x, [self.rows(name)]))

    def mean_input(self, x: Tensor, adapter_name: str) -> Tensor:
        """Return what the base reads of x, (..., D): the mean over slots in an MLP's last linear, x elsewhere."""
        if not self._closes(adapter_name):
            return x
        return self._slots(adapter_name).mean(x)

    def rank_space(self, x: Tensor, adapter_name: str, *, with_routers: bool = False) -> tuple[Tensor, Tensor]:
        """Return what `MixtureLinear` does; in an MLP's last linear u = A hbar of the mean over slots, without routers.

        v = sum_k g_k m_k A h_k, (..., Q), float32. A static K that explains v by u is the best stand-in for an MLP
        whose slots are one.
        """
        if not self._closes(adapter_name):
            return super().rank_space(x, adapter_name, with_routers=with_routers)
        slots, rows = self._slots(adapter_name), [self.rows(adapter_name)]
        mean = ops.wide(ops.features(slots.mean(x), rows))
        return mean, slots.mixed(self.mixture_spec[adapter_name].step, ops.wide(ops.features(x, rows)))

    def _closes(self, name: str) -> bool:
        place = self.mixture_spec[name].place
        return place.kind == LAST and self.mixes_whole_mlps(name) and _key(place, name) in self.routing.slots

    def _last_slots(self, name: str) -> Slots:
        """Return the slots and let go of them: they hold the graph of this pass."""
        # At the start: a recomputed pass ends as soon as the last tensor that is asked for is there.
        slots = self._slots(name)
        del self.routing.slots[_key(self.mixture_spec[name].place, name)]
        return slots

    def _slots(self, name: str) -> Slots:
        place = self.mixture_spec[name].place
        slots = self.routing.slots.get(_key(place, name))
        if slots is None:
            raise ValueError(f"{place.key} is part of a mixture of whole MLPs and runs inside its MLP only, unmerged")
        return slots


def refuse_unfit(config: MixtureConfig, key: str) -> None:
    """Raise InputRefused where a mixture of whole MLPs cannot take this linear, or its router serves no single MLP."""
    row, kind = config.row, key.rpartition(".")[2]
    if row.placement != "mlp":
        return
    if kind not in (*MLP, *row.one_expert):
        raise InputRefused(f"adapter.targets: {key}: {row.name} mixes whole MLPs; name {', '.join(MLP)}")
    for role, gate in config.routers.items():
        if gate.scope != "block":
            raise InputRefused(
                f"adapter.gates.{role}.scope: '{gate.scope}' will not do: an MLP of {row.name} has one router, 'block'"
            )


def refuse_open_blocks(layers: Iterable[MixtureLinear], adapter: str) -> None:
    """Raise InputRefused where slots would leave an MLP unmixed, because its last linear has no adapter."""
    parts = [layer.mixture_spec[adapter].place for layer in layers if layer.mixes_whole_mlps(adapter)]
    closed = {place.scope_key("block") for place in parts if place.kind == LAST}
    for place in parts:
        if place.scope_key("block") not in closed:
            raise InputRefused(f"adapter.targets: {place.key} is mixed after {LAST}; name that too")


def _key(place: Place, name: str) -> Key:
    return name, place.scope_key("block")


__all__ = ["MixtureMLPLinear", "refuse_open_blocks", "refuse_unfit"]
