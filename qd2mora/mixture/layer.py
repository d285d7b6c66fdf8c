"""MixtureLinear: a frozen linear (or block) with one or more mixtures beside it.

Tensors of an adapter (safetensors keys end in these); a linear has those that its method names:
mixture_A (M, r, d_in), mixture_B (N, d_out, r), or (Q, d_in) and (d_out, P) where ranks differ; mixture_router_down
(M, d_in), mixture_router_up (N, r) or (N, d_in) where it reads x; mixture_core; mixture_task_embedding
(tasks + 1, width) and mixture_router_task (E, width); mixture_bias_*, mixture_out_*, mixture_logits_* and
mixture_select_bias_* of a gate; mixture_shared_A (r, d_in), mixture_shared_B (d_out, r), and mixture_start_A,
mixture_start_B (negated), the frozen start of a shared expert that does not begin at zero; mixture_base_scale (1).
"""

import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from qd2mora.mixture import block, compiled, frozen, ops
from qd2mora.mixture.config import MixtureConfig
from qd2mora.mixture.fused import Dropout, Plan, add_mixture, mixed_linear
from qd2mora.mixture.gating import given_logits
from qd2mora.mixture.initial import initial_tensor
from qd2mora.mixture.low_rank import LowRank
from qd2mora.mixture.method import STATIC, TASK
from qd2mora.mixture.observer import Observer
from qd2mora.mixture.routers import Gating
from qd2mora.mixture.routing import Routing
from qd2mora.mixture.spec import ROLES, LinearSpec, Place

TENSORS = (
    "mixture_A",
    "mixture_B",
    "mixture_core",
    "mixture_shared_A",
    "mixture_shared_B",
    "mixture_start_A",
    "mixture_start_B",
    "mixture_base_scale",
    "mixture_task_embedding",
    "mixture_router_task",
    *(f"mixture_{what}_{role}" for role in ROLES for what in ("router", "bias", "out", "logits", "select_bias")),
)

Watch = Callable[..., None]
"""Called with u = [A; routers of x] x (..., Q + S + E), v = K_t u (..., P + S), and what gates read beside u."""


class MixtureLinear(nn.Module, BaseTunerLayer):
    """y = base(x) + sum over active adapters of s B K_t A x."""

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
            linear: Any = self.get_base_layer()
            place = Place("", linear.in_features, linear.out_features)
        self.in_features, self.out_features = place.d_in, place.d_out
        self.place_key = place.key
        self.layer_key = zlib.crc32(place.key.encode())
        self.routing = routing
        self.mixture_config: dict[str, MixtureConfig] = {}
        self.mixture_spec: dict[str, LinearSpec] = {}
        # A static update that stands in for routing, by adapter: what an export will hold, measured or trained.
        self.static_updates: dict[str, LowRank] = {}
        self.watchers: dict[str, Watch] = {}
        for name in TENSORS:
            setattr(self, name, nn.ParameterDict())
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, place)

    def update_layer(self, adapter_name: str, config: MixtureConfig, place: Place) -> None:
        """Add a freshly initialised adapter beside those that are there."""
        spec = config.for_linear(place)
        self.mixture_config[adapter_name], self.mixture_spec[adapter_name] = config, spec
        for name, shape in spec.shapes.items():
            getattr(self, name)[adapter_name] = nn.Parameter(initial_tensor(name, shape, config, spec))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active; of their tensors those that a method freezes stay frozen."""
        super().set_adapter(adapter_names, inference_mode)
        self._freeze()

    def set_requires_grad(self, adapter_names: str | Any, requires_grad: bool = True) -> None:
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
        return {name: getattr(self, name)[adapter_name] for name in TENSORS if adapter_name in getattr(self, name)}

    def scaling(self, adapter_name: str) -> float:
        """Return s."""
        return self.mixture_spec[adapter_name].scaling

    def banks(self, adapter_name: str) -> tuple[list[Tensor], list[Tensor]]:
        """Return the down banks, (M, r, d_in) or (ranks, d_in), and the up banks, (N, d_out, r) or (d_out, ranks)."""
        spec, tensors = self.mixture_spec[adapter_name], self._staged(adapter_name)
        down, up = tensors["mixture_A"], tensors["mixture_B"]
        if spec.step.core == "kron":
            down, up = _kron_banks(down[0], up[0], spec.step.scales)
        downs, ups = [down], [up]
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
        closing = block.closing_rank_space(self, x, adapter_name)
        if closing is not None:
            return closing
        u_ext, small = self._features(x, adapter_name)
        step = self.mixture_spec[adapter_name].step
        u = u_ext if with_routers else u_ext[..., : step.width_down + step.shared]
        return u, step.mix(u_ext, small)

    def mixing(self, x: Tensor, adapter_name: str) -> Tensor:
        """Return K_t of every token, (..., P + S, Q + S) float32: what routing made of the banks."""
        x = self.mean_input(x, adapter_name)
        return self.mixture_spec[adapter_name].step.mixing(*self._features(x, adapter_name))

    def mean_input(self, x: Tensor, adapter_name: str) -> Tensor:
        """Return what the base reads of x, (..., D): a mean over slots in a mixed MLP's last linear, x elsewhere."""
        return block.mean_input(self, x, adapter_name)

    def gatings(self, x: Tensor, adapter_name: str) -> dict[str, Gating]:
        """Return what each router decides of x (B, T, D), by role, without noise: what `inspection` counts."""
        return self.mixture_spec[adapter_name].step.route(*self._features(x, adapter_name))[1]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base output plus the active adapters' (..., d_out), in the base output's dtype."""
        if self.disable_adapters or self.merged:
            if self.merged and self.disable_adapters:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        whole = block.routed_adapter(self)
        if whole is not None:
            return block.forward(self, x, whole)
        names = [name for name in self.active_adapters if name in self.mixture_spec]
        form = self._form(x, names) if not (args or kwargs) else None
        if form is not None:
            name = names.pop(0)
            is_static = name in self.static_updates
            y = self._static(None, x, name, form) if is_static else self._routed(None, x, name, form)
        else:
            y = self.base_layer(x, *args, **kwargs)
        for name in names:
            y = self.base_scaled(y, name)
            y = self._static(y, x, name) if name in self.static_updates else self._routed(y, x, name)
        return y

    def _form(self, x: Tensor, names: list[str]) -> frozen.Form | None:
        """Return the frozen base's form where its product joins the first adapter's autograd function."""
        if not names or not torch.is_grad_enabled():
            return None
        tensors = self.tensors(names[0])
        if names[0] in self.static_updates:
            tensors |= self.static_updates[names[0]].tensors()
        if "mixture_base_scale" in tensors or torch.is_autocast_enabled(x.device.type):
            return None
        if not (x.requires_grad or any(tensor.requires_grad for tensor in tensors.values())):
            return None
        form = frozen.form_of(self.base_layer)
        # A dense linear in another dtype than x raises in its own forward.
        return form if form is None or form.blocksize or form.dtype is x.dtype else None

    def base_scaled(self, y: Tensor, name: str) -> Tensor:
        """Return a_0 y where the method scales its base, y itself elsewhere; a_0 is within 0.8 and 1.2."""
        scale = self.tensors(name).get("mixture_base_scale")
        return y if scale is None else y * (1 + 0.2 * scale.tanh()).to(y.dtype)

    def _routed(self, y: Tensor | None, x: Tensor, name: str, form: frozen.Form | None = None) -> Tensor:
        """Return y plus one adapter's output, or with a form in y's place, the base's output plus it."""
        if y is not None and not isinstance(self.get_base_layer(), nn.Linear):
            y = y.clone()  # a block's last operation may need its output in the backward pass; no adding into that
        (downs, ups), small = self.banks(name), self._small(x, name)
        downs = downs + self._routers_of_x(name)
        base = [] if form is None else frozen.tensors_of(cast(nn.Linear, self.base_layer), form)
        if torch.compiler.is_compiling():
            number = self._entry(name, form is not None, len(downs), len(ups), ",".join(small))
            return compiled.mixture(number, y, x, base, [*downs, *ups, *small.values()])
        plan, is_random = self._plan(name, form, len(downs), len(ups), tuple(small))
        if is_random:
            plan = replace(plan, draws=self.routing.draws(self.layer_key))
        if self.training:
            plan = replace(plan, observe=Observer.of(self.mixture_spec[name], self.routing, name, x))
        if name in self.watchers:
            plan = replace(plan, watch=partial(self.watchers[name], small=small))
        if y is None:
            return mixed_linear(plan, base, x, downs, ups, small)
        return add_mixture(plan, y, x, downs, ups, small)

    def _plan(
        self, name: str, form: frozen.Form | None, num_downs: int, num_ups: int, names: tuple[str, ...]
    ) -> tuple[Plan, bool]:
        """Return an adapter's plan, without what belongs to one call, and whether a call draws random numbers."""
        config, spec = self.mixture_config[name], self.mixture_spec[name]
        probability = config.dropout if self.training else 0.0
        sizes = spec.step.ranks_down if config.dropout_per_expert else (spec.step.width_down,)
        dropout = Dropout(probability, sizes) if probability else None
        is_random = probability > 0 or (self.training and any(_is_random(gate) for _, gate in spec.step.gates))
        return Plan(num_downs, num_ups, names, spec.step, spec.scaling, form, dropout), is_random

    @torch.compiler.assume_constant_result
    def _entry(self, name: str, takes_base: bool, num_downs: int, num_ups: int, names: str) -> int:
        """Return the number by which the operators of `compiled` know this adapter; runs while the layer is traced."""
        form = frozen.form_of(self.base_layer) if takes_base else None
        small = tuple(names.split(",")) if names else ()
        plan, is_random = self._plan(name, form, num_downs, num_ups, small)
        routing, key, spec = self.routing, self.layer_key, self.mixture_spec[name]
        draw = (lambda: routing.draws(key)) if is_random else None
        observer = (lambda x: Observer.of(spec, routing, name, x)) if self.training else None
        return compiled.enter(self, compiled.Entry(plan, draw, observer))

    def _static(self, y: Tensor | None, x: Tensor, name: str, form: frozen.Form | None = None) -> Tensor:
        """Return what `_routed` does, with the static update in the place of routing."""
        update = self.static_updates[name]
        plan = Plan(1, 1, (), ops.RankStep((update.rank,), (update.rank,)), update.scaling, form)
        if y is not None:
            return add_mixture(plan, y, x, [update.down], [update.up], {})
        assert form is not None
        base = frozen.tensors_of(cast(nn.Linear, self.base_layer), form)
        return mixed_linear(plan, base, x, [update.down], [update.up], {})

    def _features(self, x: Tensor, name: str) -> tuple[Tensor, dict[str, Tensor]]:
        return ops.wide(ops.features(x, [self.rows(name), *self._routers_of_x(name)])), self._small(x, name)

    def _routers_of_x(self, name: str) -> list[Tensor]:
        step, tensors = self.mixture_spec[name].step, self.tensors(name)
        return [tensors[f"mixture_router_{role}"] for role, _ in step.router_rows]

    def _small(self, x: Tensor, name: str) -> dict[str, Tensor]:
        """Return what the step in rank space reads beside u."""
        spec, tensors = self.mixture_spec[name], self._staged(name)
        small = {"core": tensors["mixture_core"]} if "mixture_core" in tensors else {}
        for role, gate in spec.step.gates:
            for what in ("bias", "out", "select_bias"):
                if f"mixture_{what}_{role}" in tensors:
                    small[f"{what}_{role}"] = tensors[f"mixture_{what}_{role}"]
            if gate.input == "z":
                small[f"router_{role}"] = tensors[f"mixture_router_{role}"]
            given = given_logits(role, x, tensors, self.routing, name, spec)
            if given is not None:
                small[f"logits_{role}"] = given
        if self.training and any(gate.capacity for _, gate in spec.step.gates):
            small["counted"] = self.routing.counted(x) if x.dim() == 3 else x.new_ones(x.shape[:-1])
        return small

    def _staged(self, name: str) -> dict[str, Tensor]:
        """Return the tensors; where a method grows in stages, with gradients for what this stage trains alone."""
        tensors = self.tensors(name)
        if not self.mixture_config[name].row.stages or self.routing.stage is None:
            return tensors
        number = torch.arange(tensors["mixture_A"].shape[0], device=tensors["mixture_A"].device)
        now, before = number == self.routing.stage, number < self.routing.stage
        trained = {"mixture_A": now.view(-1, 1, 1), "mixture_B": now.view(-1, 1, 1), "mixture_logits_down": before}
        return tensors | {key: torch.where(mask, tensors[key], tensors[key].detach()) for key, mask in trained.items()}

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return s B K A, (d_out, d_in) float32. Raises ValueError where K depends on the token or the task."""
        config = self.mixture_config[adapter_name]
        if config.depends_on != STATIC:
            raise ValueError(merge_refusal(config))
        with torch.no_grad():
            rows = self.rows(adapter_name).float()
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
        """Take merged adapters out again."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            weight, delta = self._dense_weight(name), self.get_delta_weight(name)
            weight.data = (weight.data.float() - delta).to(weight.dtype)

    def _dense_weight(self, name: str) -> nn.Parameter:
        linear: Any = self.get_base_layer()
        if "mixture_base_scale" in self.tensors(name) or not isinstance(linear, nn.Linear):
            raise ValueError("this adapter scales its base or stands beside a block; use `qd2mora merge`")
        if not linear.weight.is_floating_point():
            raise ValueError("a 4-bit base cannot take a merge: the update is lost in rounding; use `qd2mora merge`")
        return cast(nn.Parameter, linear.weight)

    def __repr__(self) -> str:
        return "mixture." + super().__repr__()


def merge_refusal(config: MixtureConfig) -> str:
    """Say why an adapter of this method cannot be folded into weights as it is, and what can be done."""
    why = "task" if config.depends_on == TASK else "token"
    return (
        f"method '{config.method}' is routed: its update depends on the {why}, so no weight matrix equals it; "
        "`qd2mora merge` exports the best static approximation and measures it"
    )


def _is_random(gate: Any) -> bool:
    return gate.score == "noisy" or gate.select == "sample"


def _kron_banks(seed_RD: Tensor, seed_OR: Tensor, scales: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return A_e = A[:, :D/s] (x) I_s one below the other, and B_e = B[:O/s] (x) I_s side by side, for every scale s.

    With a core I_r (x) K_e between them, B_e C_e A_e = (B A)[:O/s, :D/s] (x) K_e (EPT, reconstruction).
    """
    rows, columns = [], []
    for scale in scales:
        unit = torch.eye(scale, dtype=seed_RD.dtype, device=seed_RD.device)
        rows.append(torch.kron(seed_RD[:, : seed_RD.shape[1] // scale].contiguous(), unit))
        columns.append(torch.kron(seed_OR[: seed_OR.shape[0] // scale].contiguous(), unit))
    return torch.cat(rows), torch.cat(columns, -1)


__all__ = ["TENSORS", "MixtureLinear", "merge_refusal"]
