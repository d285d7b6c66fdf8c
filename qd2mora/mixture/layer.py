"""MixtureLinear: a frozen linear (or block) with one or more mixtures beside it.

A forward pass gathers what `fused` needs and leaves the arithmetic to it: the banks, what `gating` scores outside the
product over x, and the frozen base where its product may join. `spec` says what an adapter has here, `ops` what K_t is.

Tensors of an adapter (safetensors keys end in these); a linear has those that its method names:
mixture_A (M, r, d_in), mixture_B (N, d_out, r), or (Q, d_in) and (d_out, P) where ranks differ; mixture_router_down
(M, d_in), mixture_router_up (N, r) or (N, d_in) where it reads x; mixture_core; mixture_task_embedding
(tasks + 1, width) and mixture_router_task (E, width); mixture_bias_*, mixture_out_*, mixture_logits_* and
mixture_select_bias_* of a gate; mixture_shared_A (r, d_in), mixture_shared_B (d_out, r), and mixture_start_A,
mixture_start_B (negated), the frozen start of a shared expert that does not begin at zero; mixture_base_scale (1);
mixture_magnitude (E, d_out) of experts that are DoRAs.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from qd2mora.mixture import compiled, frozen, magnitude
from qd2mora.mixture.config import MixtureConfig
from qd2mora.mixture.draws import Draws
from qd2mora.mixture.fused import Dropout, FusedCall, Watch, add_mixture, mixed_linear
from qd2mora.mixture.gating import given_logits, is_given
from qd2mora.mixture.initialisers import initial_tensor
from qd2mora.mixture.low_rank import LowRank
from qd2mora.mixture.observer import Observer, Pooling, pooling
from qd2mora.mixture.parts import TENSORS
from qd2mora.mixture.registration import MODEL_PREFIX
from qd2mora.mixture.routing import Routing
from qd2mora.mixture.spec import LinearSpec, Place, linear_spec
from qd2mora.routed import ops
from qd2mora.routed.gate import STATIC
from qd2mora.routed.routers import Gating


class MixtureLinear(nn.Module, BaseTunerLayer):
    """y = base(x) + sum over active adapters of s B K_t A x."""

    # PEFT moves and deletes an adapter by what these two name, and asks every linear for every name.
    adapter_layer_names = TENSORS
    other_param_names = ("mixture_config", "mixture_spec")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: MixtureConfig,
        routing: Routing,
        place: Place | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        if place is None:
            linear = cast(nn.Linear, self.get_base_layer())
            place = Place("", linear.in_features, linear.out_features)
        self.in_features, self.out_features = place.d_in, place.d_out
        self.place_key = place.key
        # A layer's random numbers follow its name: the same whatever other linears are adapted, and in every process.
        self.layer_key = zlib.crc32(place.key.encode())
        self.routing = routing
        self.mixture_config: dict[str, MixtureConfig] = {}
        self.mixture_spec: dict[str, LinearSpec] = {}
        # A static update that stands in for routing, by adapter: what an export will hold, measured or trained.
        self.static_updates: dict[str, LowRank] = {}
        self.watchers: dict[str, Watch] = {}
        # A shorter way to the same output while text is written (`inference`), which may decline.
        self.shortcut: Callable[[Tensor], Tensor | None] | None = None
        for name in TENSORS:
            setattr(self, name, nn.ParameterDict())
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, place)

    def update_layer(self, adapter_name: str, config: MixtureConfig, place: Place) -> None:
        """Add a freshly initialised adapter beside those that are there."""
        spec = linear_spec(config, place)
        self.mixture_config[adapter_name], self.mixture_spec[adapter_name] = config, spec
        for name, shape in spec.shapes.items():
            getattr(self, name)[adapter_name] = nn.Parameter(initial_tensor(name, shape, config, spec))
        for name in spec.shapes.keys() & {magnitude.NAME}:
            getattr(self, name)[adapter_name].data = magnitude.start(self.get_base_layer(), spec.shapes[name][0])
        # Drawn on the CPU and moved: one seed gives one start on every device.
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active; of their tensors those that a method freezes stay frozen."""
        # PEFT trains every tensor of an active adapter; what a method freezes (a sparse A, a shared start) is put back.
        super().set_adapter(adapter_names, inference_mode)
        self._freeze()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Switch training of adapters, except for the tensors that a method freezes."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze()

    def _freeze(self) -> None:
        for adapter, spec in self.mixture_spec.items():
            for name in spec.frozen:
                if adapter in getattr(self, name):
                    getattr(self, name)[adapter].requires_grad_(False)

    def tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """Return the adapter's tensors by name."""
        return {name: getattr(self, name)[adapter_name] for name in self.mixture_spec[adapter_name].shapes}

    def scaling(self, adapter_name: str) -> float:
        """Return s."""
        return self.mixture_spec[adapter_name].scaling

    def banks(self, adapter_name: str) -> tuple[list[Tensor], list[Tensor]]:
        """Return the down banks, (M, r, d_in) or (ranks, d_in), and the up banks, (N, d_out, r) or (d_out, ranks)."""
        spec, tensors = self.mixture_spec[adapter_name], self.tensors(adapter_name)
        down, up = tensors["mixture_A"], tensors["mixture_B"]
        if spec.step.core == "kron":
            down, up = ops.kron_banks(down[0], up[0], spec.step.scales)
        downs, ups = [down], [up]
        # The start comes negated, so that adding it takes it away.
        for name in ("shared", "start"):
            if f"mixture_{name}_A" in tensors:
                downs.append(tensors[f"mixture_{name}_A"])
                ups.append(tensors[f"mixture_{name}_B"])
        return downs, ups

    def rows(self, adapter_name: str) -> Tensor:
        """Return everything u = A x stands for, (Q + S, d_in), without the routers."""
        return torch.cat([ops.stack_rows(bank) for bank in self.banks(adapter_name)[0]])

    def columns(self, adapter_name: str) -> Tensor:
        """Return everything that v is multiplied with, (d_out, P + S)."""
        return torch.cat([ops.stack_columns(bank) for bank in self.banks(adapter_name)[1]], -1)

    def linear_rows(self, adapter_name: str) -> Tensor:
        """Return all that reads x linearly: [A; routers of x], (Q + S + E, d_in); a static update may use any of it."""
        return torch.cat([self.rows(adapter_name), *self._routers_of_x(adapter_name)])

    def rank_space(self, x: Tensor, adapter_name: str, *, with_routers: bool = False) -> tuple[Tensor, Tensor]:
        """Return u = A x, (..., Q + S), and v = K_t u, (..., P + S), float32, without dropout; s B v is the output.

        `with_routers`: u is [A; routers of x] x, (..., Q + S + E).
        """
        u_ext, small = self._features(x, adapter_name)
        step = self.mixture_spec[adapter_name].step
        v = step.mix(u_ext, small)
        if with_routers:
            return u_ext, v
        return u_ext[..., : step.width_down + step.shared], v

    def mixing(self, x: Tensor, adapter_name: str) -> Tensor:
        """Return K_t of every token, (..., P + S, Q + S) float32: what routing made of the banks."""
        x = self.mean_input(x, adapter_name)
        return self.mixture_spec[adapter_name].step.mixing(*self._features(x, adapter_name))

    def mean_input(self, x: Tensor, adapter_name: str) -> Tensor:
        """Return what the base reads of x, (..., D): x itself, but in the last linear of a mixture of whole MLPs."""
        return x

    def mixes_whole_mlps(self, adapter_name: str) -> bool:
        """Tell whether this adapter has its experts in whole MLPs, of which this linear is a part."""
        return False

    def gatings(self, x: Tensor, adapter_name: str) -> dict[str, Gating]:
        """Return what each router decides of x (B, T, D), by role, without noise: what `inspection` counts."""
        return self.mixture_spec[adapter_name].step.route(*self._features(x, adapter_name))[1]

    @property
    def runs_base_alone(self) -> bool:
        """Whether a pass leaves routing out: adapters are switched off, or folded into the weight."""
        return bool(self.disable_adapters or self.merged)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return the base output plus the active adapters' (..., d_out), in the base output's dtype."""
        if self.shortcut is not None and not (args or kwargs) and (quick := self.shortcut(x)) is not None:
            return quick
        if self.runs_base_alone:
            # Disabled means the base as it was: what was folded in comes out again, as in PEFT's own layers.
            if self.merged and self.disable_adapters:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.mixture_spec]
        layout = None
        # Arguments beside x are meant for the base's own forward, which then has to run.
        if not (args or kwargs):
            layout = self._layout_to_fuse(x, names)
        # The first adapter's function computes the base's product as well, where that may be: then x is saved once,
        # and the base's gradient and the mixture's are one pass. What is left adds into a base output that is there.
        if layout is not None:
            y = self._added(None, x, names.pop(0), layout)
        else:
            y = self.base_layer(x, *args, **kwargs)
        for name in names:
            y = self._added(self.base_scaled(y, name), x, name)
            y = self.magnified(y, y.new_ones(1), name)
        return y

    def magnified(self, y: Tensor, which: Tensor, name: str) -> Tensor:
        """Return y (..., O) at the magnitude of the expert that `which` (..., E) tells, where experts have one."""
        spec, trained = self.mixture_spec[name], self.tensors(name).get(magnitude.NAME)
        if trained is None:
            return y
        if len(self.active_adapters) > 1:
            raise ValueError(f"adapter '{name}' scales the base's own output and runs alone on it")
        banks = self.rows(name), self.columns(name), spec.step.ranks_down
        return magnitude.magnified(y, which, trained, magnitude.norms(self.get_base_layer(), *banks, spec.scaling))

    def _layout_to_fuse(self, x: Tensor, names: list[str]) -> frozen.WeightLayout | None:
        """Return the frozen base's layout where its product joins the first adapter's autograd function."""
        if not names or not torch.is_grad_enabled():
            return None
        # A scaled base must be there before the mixture; under autocast the base's own forward picks its dtype.
        tensors = self.tensors(names[0])
        if names[0] in self.static_updates:
            tensors |= self.static_updates[names[0]].tensors()
        if tensors.keys() & {"mixture_base_scale", magnitude.NAME} or torch.is_autocast_enabled(x.device.type):
            return None
        # Where nothing needs a gradient, nothing is saved either, and the base's own forward is as good.
        if not (x.requires_grad or any(tensor.requires_grad for tensor in tensors.values())):
            return None
        layout = frozen.layout_of(self.base_layer)
        if layout is not None and not layout.blocksize and layout.dtype is not x.dtype:
            return None  # a dense linear in another dtype than x raises in its own forward
        return layout

    def base_scaled(self, y: Tensor, name: str) -> Tensor:
        """Return a_0 y where the method scales its base, y itself elsewhere; a_0 is within 0.8 and 1.2."""
        scale = self.tensors(name).get("mixture_base_scale")
        if scale is None:
            return y
        # LightZero's bounded scale; the parameter starts at 0 and the scale at 1, so that step 0 is the base.
        return y * (1 + 0.2 * scale.tanh()).to(y.dtype)

    def _added(self, y: Tensor | None, x: Tensor, name: str, layout: frozen.WeightLayout | None = None) -> Tensor:
        """Return y plus one adapter's output, or with a layout in y's place, the base's output plus it."""
        if name in self.static_updates:
            return self._static(y, x, name, layout)
        return self._routed(y, x, name, layout)

    def _routed(self, y: Tensor | None, x: Tensor, name: str, layout: frozen.WeightLayout | None) -> Tensor:
        if y is not None and not isinstance(self.get_base_layer(), nn.Linear):
            y = y.clone()  # a block's last operation may need its output in the backward pass; no adding into that
        (downs, ups), small = self.banks(name), self._small(x, name)
        downs = downs + self._routers_of_x(name)
        base = frozen.tensors_of(self.base_layer, layout)
        # Under a compiler the call's rest (draws, observers) cannot be passed on, only a number that stands for it.
        if torch.compiler.is_compiling():
            number = self._traced(name, layout is not None, len(downs), len(ups), ",".join(small))
            return compiled.mixture(number, y, x, base, [*downs, *ups, *small.values()])
        call, is_random = self._call(name, layout, len(downs), len(ups), tuple(small))
        # Bound to this pass: its backward pass must draw the same numbers and see the same batch.
        call = replace(call, draws=self._draws(is_random)(), observe=self._observer(name)(x))
        call = replace(call, watch=self._pooling(name)(call, x, small))
        if name in self.watchers:
            call = replace(call, watch=partial(self.watchers[name], small=small))
        if y is None:
            return mixed_linear(call, base, x, downs, ups, small)
        return add_mixture(call, y, x, downs, ups, small)

    def _call(
        self, name: str, layout: frozen.WeightLayout | None, num_downs: int, num_ups: int, names: tuple[str, ...]
    ) -> tuple[FusedCall, bool]:
        """Return what an adapter's call knows, without what belongs to one call, and whether it draws numbers."""
        spec, dropout = self.mixture_spec[name], self._dropout(name)
        step = spec.step_in(self.routing.phase) if self.training or self.routing.phase.is_open else spec.step
        is_random = dropout is not None or (self.training and any(gate.is_random for _, gate in step.gates))
        return FusedCall(num_downs, num_ups, names, step, spec.scaling, layout, dropout), is_random

    def _dropout(self, name: str) -> Dropout | None:
        config, step = self.mixture_config[name], self.mixture_spec[name].step
        if not (self.training and config.dropout):
            return None
        return Dropout(config.dropout, step.ranks_down if config.dropout_per_expert else (step.width_down,))

    def _draws(self, is_random: bool) -> Callable[[], Draws | None]:
        # Holds no layer: the operators of `compiled` keep it for as long as the layer lives, and no longer.
        routing, key = self.routing, self.layer_key
        return lambda: routing.draws(key) if is_random else None

    def _observer(self, name: str) -> Callable[[Tensor], Observer | None]:
        return partial(Observer.of, self.mixture_spec[name], self.routing, name if self.training else None)

    def _pooling(self, name: str) -> Pooling:
        return partial(pooling, self.mixture_spec[name], self.routing, name if self.training else None)

    @torch.compiler.assume_constant_result
    def _traced(self, name: str, takes_base: bool, num_downs: int, num_ups: int, names: str) -> int:
        """Return the number by which the operators of `compiled` know this adapter; runs while the layer is traced."""
        layout = None
        if takes_base:
            layout = frozen.layout_of(self.base_layer)
        call, is_random = self._call(name, layout, num_downs, num_ups, tuple(filter(None, names.split(","))))
        rest = self._draws(is_random), self._observer(name), self._pooling(name)
        adapter = compiled.TracedAdapter(call, is_random, self.layer_key, *rest)
        return compiled.register(self, adapter)

    def _static(self, y: Tensor | None, x: Tensor, name: str, layout: frozen.WeightLayout | None) -> Tensor:
        """Return what `_routed` does, with the static update in the place of routing."""
        update = self.static_updates[name]
        # Without gates the step is the identity: s B A x by the same function, with gradients for distillation.
        call = FusedCall(1, 1, (), ops.RankStep((update.rank,), (update.rank,)), update.scaling, layout)
        if y is None:
            return mixed_linear(call, frozen.tensors_of(self.base_layer, layout), x, [update.down], [update.up], {})
        return add_mixture(call, y, x, [update.down], [update.up], {})

    def _features(self, x: Tensor, name: str) -> tuple[Tensor, dict[str, Tensor]]:
        return ops.wide(ops.features(x, [self.rows(name), *self._routers_of_x(name)])), self._small(x, name)

    def _routers_of_x(self, name: str) -> list[Tensor]:
        step, tensors = self.mixture_spec[name].step, self.tensors(name)
        return [tensors[f"mixture_router_{role}"] for role, _ in step.router_rows]

    def _small(self, x: Tensor, name: str) -> dict[str, Tensor]:
        """Return what the step in rank space reads beside u."""
        return self.own_small(name) | self.given_small(x, name)

    def own_small(self, name: str) -> dict[str, Tensor]:
        """Return what of it no pass changes."""
        spec, tensors = self.mixture_spec[name], self.tensors(name)
        own = {}
        if "mixture_core" in tensors:
            own["core"] = tensors["mixture_core"]
        for role, gate in spec.step.gates:
            for what in ("bias", "out", "select_bias"):
                if f"mixture_{what}_{role}" in tensors:
                    own[f"{what}_{role}"] = tensors[f"mixture_{what}_{role}"]
            if gate.input == "z":
                own[f"router_{role}"] = tensors[f"mixture_router_{role}"]
        return own

    def given_small(self, x: Tensor, name: str) -> dict[str, Tensor]:
        """Return what of it a pass brings: logits of routers that read something else than a token."""
        spec, tensors = self.mixture_spec[name], self.tensors(name)
        given = (role for role, gate in spec.step.gates if is_given(gate))
        return {f"logits_{role}": given_logits(role, x, tensors, self.routing, name, spec) for role in given}

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return s B K A, (d_out, d_in) float32. Raises ValueError where K depends on the token or the task."""
        config = self.mixture_config[adapter_name]
        if config.routers.depends_on != STATIC:
            raise ValueError(config.merge_refusal)
        with torch.no_grad():
            rows = self.rows(adapter_name).float()
            # A static K is the same for every token: any one shows it.
            K = self.mixing(rows.new_zeros(1, 1, rows.shape[1]), adapter_name)[0, 0]
            return self.scaling(adapter_name) * self.columns(adapter_name).float() @ (K @ rows)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold static adapters into a dense base weight. Raises ValueError for routed ones and for a 4-bit base."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.mixture_config]
        # Every update before the first is added, so that a refusal leaves the weight as it was.
        for name, delta in [(name, self.get_delta_weight(name)) for name in names]:
            weight = self._dense_weight(name)
            merged = (weight.data.float() + delta).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"merging adapter '{name}' gives weights that are not finite")
            weight.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take merged adapters out again: in 16 bits up to a rounding, as the sum was rounded when it was merged."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            weight, delta = self._dense_weight(name), self.get_delta_weight(name)
            weight.data = (weight.data.float() - delta).to(weight.dtype)

    def _dense_weight(self, name: str) -> Tensor:
        linear = self.get_base_layer()
        if self.tensors(name).keys() & {"mixture_base_scale", magnitude.NAME} or not isinstance(linear, nn.Linear):
            raise ValueError("this adapter scales its base or stands beside a block; use `qd2mora merge`")
        if not linear.weight.is_floating_point():
            raise ValueError("a 4-bit base cannot take a merge: the update is lost in rounding; use `qd2mora merge`")
        return linear.weight

    def __repr__(self) -> str:
        return "mixture." + super().__repr__()


def mixture_layers(model: nn.Module) -> dict[str, MixtureLinear]:
    """Return the adapted linears by their name in the base model."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, MixtureLinear)}
    return {name.removeprefix(MODEL_PREFIX): module for name, module in found.items()}


__all__ = ["MixtureLinear", "mixture_layers"]
