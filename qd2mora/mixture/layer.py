"""MixtureLinear: a frozen linear with one or more mixtures beside it.

Tensors of an adapter (safetensors keys end in these):
mixture_A (M, r, d_in), mixture_B (N, d_out, r), mixture_router_down (M, d_in), mixture_router_up (N, r), or (N, d_in)
where the method's up router reads x; mixture_core (r, r); mixture_task_embedding (tasks + 1, width) and
mixture_router_task (E, width) where the gate reads the task.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from qd2mora.mixture import ops
from qd2mora.mixture.config import MixtureConfig
from qd2mora.mixture.fused import add_mixture
from qd2mora.mixture.presets import STATIC, Method

TENSORS = (
    "mixture_A",
    "mixture_B",
    "mixture_router_down",
    "mixture_router_up",
    "mixture_core",
    "mixture_task_embedding",
    "mixture_router_task",
)


@dataclass
class Routing:
    """What routers need beside the hidden states: the task of each row, (batch,) int64; and, while training, a key and
    the unpadded length of each row, on which dropout may depend."""

    task_index: Tensor | None = None
    rows: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None


def tensor_shapes(config: MixtureConfig, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
    """Return name to shape of every tensor that one adapter of this configuration has on a (d_out, d_in) linear."""
    row, num_down, num_up = config.row, config.num_down, config.num_up
    assert config.rank is not None
    shapes: dict[str, tuple[int, ...]] = {
        "mixture_A": (num_down, config.rank, d_in),
        "mixture_B": (num_up, d_out, config.rank),
    }
    if row.gate_down and row.gate_down.input == "x":
        shapes["mixture_router_down"] = (num_down, d_in)
    if row.gate_up:
        shapes["mixture_router_up"] = (num_up, d_in if row.gate_up.input == "x" else config.rank)
    if row.core == "dense":
        shapes["mixture_core"] = (config.rank, config.rank)
    if row.task_embedding is not None:
        assert config.num_tasks is not None and config.task_embedding is not None
        # One row more than tasks, as in the authors' code.
        shapes["mixture_task_embedding"] = (config.num_tasks + 1, config.task_embedding)
        shapes["mixture_router_task"] = (num_down, config.task_embedding)
    return shapes


class MixtureLinear(nn.Module, BaseTunerLayer):
    """y = base(x) + sum over active adapters of s B K_t A x."""

    adapter_layer_names = TENSORS
    other_param_names = ("mixture_config",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MixtureConfig, routing: Routing) -> None:
        super().__init__()
        self.base_layer = base_layer
        linear: Any = self.get_base_layer()
        self.in_features: int = linear.in_features
        self.out_features: int = linear.out_features
        self.routing = routing
        self.mixture_config: dict[str, MixtureConfig] = {}
        # A constant K that stands in for routing while an export is measured, by adapter.
        self.static_mixing: dict[str, Tensor] = {}
        for name in TENSORS:
            setattr(self, name, nn.ParameterDict())
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: MixtureConfig) -> None:
        """Add a freshly initialised adapter beside those that are there."""
        self.mixture_config[adapter_name] = config
        for name, shape in tensor_shapes(config, self.in_features, self.out_features).items():
            getattr(self, name)[adapter_name] = nn.Parameter(_initial(name, shape, config.row))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """Return the adapter's tensors by name."""
        return {name: getattr(self, name)[adapter_name] for name in TENSORS if adapter_name in getattr(self, name)}

    def rank_space(self, x: Tensor, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return u = A x, (..., M*r), and v = K_t u, (..., N*r), float32, without dropout; s B v is the output."""
        u_ext, small = self._features(x, adapter_name)
        step = self.mixture_config[adapter_name].step
        return u_ext[..., : step.num_down * step.rank], step.mix(u_ext, **small)

    def mixing(self, x: Tensor, adapter_name: str) -> Tensor:
        """Return K_t of every token, (..., N*r, M*r) float32: what routing made of the banks."""
        u_ext, small = self._features(x, adapter_name)
        step = self.mixture_config[adapter_name].step
        core = torch.eye(step.rank, device=x.device) if small["core"] is None else small["core"].float()
        if step.is_tied:
            assert small["gate_pair"] is not None
            blocks = torch.diag_embed(small["gate_pair"].expand(*u_ext.shape[:-1], -1))
        else:
            gate_down, gate_up, _ = step.chain(u_ext, small["router_z"], small["core"])
            down, up = (u_ext.new_ones(*u_ext.shape[:-1], 1) if gate is None else gate for gate in (gate_down, gate_up))
            blocks = up.unsqueeze(-1) * down.unsqueeze(-2)
        return torch.einsum("...ji,qp->...jqip", blocks, core).flatten(-2).flatten(-3, -2)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base output plus the active adapters' (..., d_out), in the base output's dtype."""
        if self.disable_adapters or self.merged:
            if self.merged and self.disable_adapters:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            if name in self.static_mixing:
                y = y + self._static(x, name).to(y.dtype)
            elif name in self.mixture_config:
                y = self._routed(y, x, name)
        return y

    def _routed(self, y: Tensor, x: Tensor, name: str) -> Tensor:
        config, tensors = self.mixture_config[name], self.tensors(name)
        router_x, small = self._routers(x, name)
        return add_mixture(
            y,
            x,
            tensors["mixture_A"],
            tensors["mixture_B"],
            config.step,
            config.scaling,
            router_x=router_x,
            **small,
            dropout=config.dropout if self.training else 0.0,
            num_masks=config.num_down if config.dropout_per_expert else 1,
        )

    def _static(self, x: Tensor, name: str) -> Tensor:
        tensors = self.tensors(name)
        v = F.linear(ops.wide(ops.features(x, tensors["mixture_A"])), self.static_mixing[name])
        return ops.up_product(v, tensors["mixture_B"], self.mixture_config[name].scaling, x.dtype)

    def _features(self, x: Tensor, name: str) -> tuple[Tensor, dict[str, Tensor | None]]:
        router_x, small = self._routers(x, name)
        return ops.wide(ops.features(x, self.tensors(name)["mixture_A"], router_x)), small

    def _routers(self, x: Tensor, name: str) -> tuple[Tensor | None, dict[str, Tensor | None]]:
        """Return the router rows that read x, and what the step in rank space reads besides."""
        row, tensors = self.mixture_config[name].row, self.tensors(name)
        down, up = tensors.get("mixture_router_down"), tensors.get("mixture_router_up")
        up_reads_x = row.gate_up is not None and row.gate_up.input == "x"
        reading_x = [router for router in (down, up if up_reads_x else None) if router is not None]
        small = {
            "router_z": None if up_reads_x else up,
            "core": tensors.get("mixture_core"),
            "gate_pair": self._task_gate(x, tensors) if row.pairing == "tied" else None,
        }
        return (torch.cat(reading_x) if len(reading_x) > 1 else next(iter(reading_x), None)), small

    def _task_gate(self, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        index = self.routing.task_index
        table = tensors["mixture_task_embedding"]
        if index is None:
            raise ValueError("this adapter routes by task: pass task_index=(batch,) to the model's forward")
        if int(index.max()) >= table.shape[0] - 1 or int(index.min()) < 0:
            raise ValueError(f"task_index {index.tolist()} is outside the {table.shape[0] - 1} tasks of this adapter")
        with ops.unlowered(table):
            logits = F.linear(ops.wide(table[index.to(table.device)]), ops.wide(tensors["mixture_router_task"]))
        gate = logits.softmax(-1)
        return gate.view(gate.shape[0], *([1] * (x.dim() - 2)), gate.shape[1])

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return s B C A, (d_out, d_in) float32. Raises ValueError where K depends on the token or the task."""
        config, tensors = self.mixture_config[adapter_name], self.tensors(adapter_name)
        if config.row.depends_on != STATIC:
            raise ValueError(merge_refusal(config.row))
        A_RD = tensors["mixture_A"][0].float()
        if "mixture_core" in tensors:
            A_RD = tensors["mixture_core"].float() @ A_RD
        return config.scaling * tensors["mixture_B"][0].float() @ A_RD

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold static adapters into a dense base weight. Raises ValueError for routed ones and for a 4-bit base."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.mixture_config]
        # Every update before the first is added, so that a refusal leaves the weight as it was.
        for name, delta in [(name, self.get_delta_weight(name)) for name in names]:
            weight = self._dense_weight()
            merged = (weight.data.float() + delta).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"merging adapter '{name}' gives weights that are not finite")
            weight.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take merged adapters out again."""
        while self.merged_adapters:
            delta = self.get_delta_weight(self.merged_adapters.pop())
            weight = self._dense_weight()
            weight.data = (weight.data.float() - delta).to(weight.dtype)

    def _dense_weight(self) -> nn.Parameter:
        linear: Any = self.get_base_layer()
        weight: nn.Parameter = linear.weight
        if not weight.is_floating_point():
            raise ValueError("a 4-bit base cannot take a merge: the update is lost in rounding; use `qd2mora merge`")
        return weight

    def __repr__(self) -> str:
        return "mixture." + super().__repr__()


def merge_refusal(row: Method) -> str:
    """Say why an adapter of this method cannot be folded into weights as it is, and what can be done."""
    why = "task" if row.depends_on == "task" else "token"
    return (
        f"method '{row.name}' is routed: its update depends on the {why}, so no weight matrix equals it; "
        "`qd2mora merge` exports the best static approximation and measures it"
    )


def _initial(name: str, shape: tuple[int, ...], row: Method) -> Tensor:
    """B zero, so that the adapted model starts as the base for any router; the rest as each method's code does."""
    tensor = torch.empty(shape)
    if name == "mixture_B":
        return nn.init.zeros_(tensor)
    if name == "mixture_A" and row.init_down == "gaussian":
        return nn.init.normal_(tensor, std=0.01)
    if name == "mixture_task_embedding":
        return nn.init.normal_(tensor)
    # Kaiming uniform with a = sqrt(5) over the last axis: U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
    bound = 1 / math.sqrt(shape[-1])
    return nn.init.uniform_(tensor, -bound, bound)


__all__ = ["TENSORS", "MixtureLinear", "Routing", "merge_refusal", "tensor_shapes"]
