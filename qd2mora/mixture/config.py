"""MixtureConfig: any method of the table, as a PEFT configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, get_args

from peft import PeftConfig

from qd2mora.errors import InputRefused, nearest
from qd2mora.mixture import balance, sections
from qd2mora.mixture.method import Method, Penalty, check_counts, check_gate, experts_by_layer
from qd2mora.mixture.penalties import WEIGHT_PENALTIES
from qd2mora.mixture.presets import find_method
from qd2mora.mixture.registration import QD2MORA
from qd2mora.mixture.start_folder import KEY as START
from qd2mora.mixture.start_folder import OF_A_RUN, alike, start_settings
from qd2mora.mixture.trained_experts import experts_given
from qd2mora.recipe.adapter import Adapter, DownInit
from qd2mora.routed.gate import ROLES, Gate, Gates

GateChanges = Mapping[str, object]
"""Fields of one router that a configuration sets."""


@dataclass
class MixtureConfig(PeftConfig):
    """A mixture of LoRA on `nn.Linear` or `bnb.nn.Linear4bit`.

    Fields left None take the method's own defaults. `down` and `up` are {"experts": n}; `gates` overrides fields of a
    gate by role, {"down": {"select": "top_k", "top_k": 2}}; `shared` adds one ungated expert, {"rank": 8, "init":
    "pissa"}. `scaling` is alpha / rank, or alpha / sqrt(rank) with `rank_stabilized`.

    Raises InputRefused where the method forbids a value.
    """

    method: str = field(default="d2mora", metadata={"help": "a row of `qd2mora methods`"})
    rank: int | None = field(default=None, metadata={"help": "inner width of one expert"})
    ranks: list[int] | None = field(default=None, metadata={"help": "a rank for each paired expert"})
    attention_rank: int | None = field(default=None, metadata={"help": "rank of linears with one expert"})
    alpha: float | None = field(default=None, metadata={"help": "the update is scaled by alpha / rank"})
    rank_stabilized: bool = field(default=False, metadata={"help": "scale by alpha / sqrt(rank)"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the input of the down experts"})
    dropout_per_expert: bool = field(default=False, metadata={"help": "one dropout mask per down expert"})
    down: dict[str, int] | None = field(default=None, metadata={"help": '{"experts": M}'})
    up: dict[str, int] | None = field(default=None, metadata={"help": '{"experts": N}'})
    core: dict[str, int] | None = field(default=None, metadata={"help": '{"experts": E}, the routed cores'})
    allocation: str | None = field(default=None, metadata={"help": "experts by depth, such as 2-4-6-8"})
    gates: dict[str, GateChanges] | None = field(default=None, metadata={"help": "fields of gates by role"})
    penalties: dict[str, float] | None = field(default=None, metadata={"help": "weights of penalties by kind"})
    shared: dict[str, float | str] | None = field(
        default=None, metadata={"help": '{"rank": r, "alpha": a, "init": name}'}
    )
    experts: str | None = field(default=None, metadata={"help": "dora: each expert has a magnitude"})
    init: DownInit | None = field(default=None, metadata={"help": "how down experts start"})
    num_tasks: int | None = field(default=None, metadata={"help": "tasks that a task-routed method tells apart"})
    task_embedding: int | None = field(default=None, metadata={"help": "width of the task embedding"})
    external_width: int | None = field(default=None, metadata={"help": "width of the vector a row brings"})
    train_experts: bool = field(default=True, metadata={"help": "whether given experts go on training"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "names, a regex, or 'all-linear'"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "names or a regex to leave out"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "decoder layers to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of layers"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained and saved whole"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = QD2MORA
        method = self.row
        self._take_experts(method)
        if self.alpha is None:
            self.alpha = method.alpha
        self.alpha = float(self.alpha)
        if self.init is None:
            self.init = method.init_down
        if self.task_embedding is None:
            self.task_embedding = method.task_embedding
        # After the defaults are in, so that a row of the table is checked like any recipe.
        self._check(method)

    def _take_experts(self, method: Method) -> None:
        """Take what is not given of experts and ranks from the method, or from what is given of them."""
        # A number of experts that is given is meant for every layer, whatever the method's schedule.
        if self.down is None and self.up is None and self.allocation is None:
            self.allocation = method.allocation
        if self.ranks is None and self.rank is None and method.ranks is not None:
            self.ranks = list(method.ranks)
        if self.ranks is not None and self.down is None:
            self.down = self.up = {"experts": len(self.ranks)}
        if self.rank is None:
            self.rank = max(self.ranks or [method.rank])
        if self.down is None:
            self.down = {"experts": method.down}
        if self.up is None:
            self.up = {"experts": method.up}
        self.down, self.up = dict(self.down), dict(self.up)

    @property
    def row(self) -> Method:
        """The method's row of the table."""
        return find_method(self.method)

    @cached_property
    def routers(self) -> Gates:
        """The method's gates by role, with this configuration's changes."""
        changes = self.gates or {}
        return Gates({role: _changed(gate, changes.get(role, {})) for role, gate in self.row.gates.items()})

    @property
    def num_down(self) -> int:
        assert self.down is not None
        return self.down["experts"]

    @property
    def num_up(self) -> int:
        assert self.up is not None
        return self.up["experts"]

    @property
    def num_cores(self) -> int:
        """The cores that a router mixes; the method's own number unless given."""
        return self.row.cores if self.core is None else self.core["experts"]

    @property
    def scaling(self) -> float:
        """alpha over the rank of one expert (or its root), or of all where the method's code divides by that."""
        assert self.rank is not None
        return self.scaling_of(self.ranks or [self.rank] * self.num_down)

    def scaling_of(self, ranks: Sequence[int], rank_of_one: int | None = None) -> float:
        """Return the scale of a linear whose experts have these ranks, or one expert that has a rank of its own."""
        assert self.rank is not None and self.alpha is not None
        # The largest of several ranks (`_take_experts`): one scale for all experts, alpha / max(r_e).
        rank: float = rank_of_one or self.rank
        if self.row.scaling_rank == "total":
            rank = sum(ranks)
        elif self.row.scaling_rank == "active":
            rank = min(self.routers["rank"].top_k or rank, rank)
        if self.rank_stabilized:
            rank = rank**0.5  # rsLoRA: outputs of large ranks keep their size
        return self.alpha / rank

    @property
    def shared_rank(self) -> int:
        return int((self.shared or {}).get("rank", 0))

    @property
    def shared_init(self) -> str:
        return str((self.shared or {}).get("init", "kaiming"))

    @property
    def shared_scaling(self) -> float:
        """alpha over the rank of the shared expert; alpha is twice the rank unless given."""
        if self.shared is None:
            return 0.0
        return float(self.shared.get("alpha", 2 * self.shared_rank)) / self.shared_rank

    @property
    def subtracts_start(self) -> bool:
        """Whether the shared expert starts away from zero, so that its start is taken off again."""
        return self.shared_init in ("pissa", "olora")

    @property
    def shared_banks(self) -> tuple[str, ...]:
        """The shared expert's pairs of tensors: none, its own, and the frozen start that is taken off again."""
        if self.shared is None:
            return ()
        if self.subtracts_start:
            return ("shared", "start")
        return ("shared",)

    @property
    def frozen_tensors(self) -> frozenset[str]:
        """Names of tensors that are never trained."""
        # Selection biases move by the load (`after_step`), never by a gradient.
        names = {"mixture_start_A", "mixture_start_B", *(f"mixture_select_bias_{role}" for role in ROLES)}
        if self.init == "sparse":
            names.add("mixture_A")
        if not self.train_experts:
            names |= {"mixture_A", "mixture_B"}
        return frozenset(names.union(self.row.frozen))

    @cached_property
    def all_penalties(self) -> tuple[Penalty, ...]:
        """The method's penalties with this configuration's weights; those of weight 0 are left out."""
        # Of a kind that the method has, a weight alone is changed: its order, its delta and what it averages over stay.
        weights = dict(self.penalties or {})
        kept = [replace(each, weight=weights.pop(each.kind, each.weight)) for each in self.row.penalties]
        kept += [Penalty(kind, weight) for kind, weight in weights.items()]
        return tuple(each for each in kept if each.weight > 0)

    @property
    def routing_penalties(self) -> tuple[Penalty, ...]:
        """Those that read routing."""
        return tuple(each for each in self.all_penalties if each.kind in balance.PENALTIES)

    @property
    def weight_penalties(self) -> tuple[Penalty, ...]:
        """Those that read weights alone."""
        return tuple(each for each in self.all_penalties if each.kind in WEIGHT_PENALTIES)

    @property
    def merge_refusal(self) -> str:
        """Why an adapter of this method cannot be folded into weights as it is, and what can be done."""
        return (
            f"method '{self.method}' is routed: its update depends on the {self.routers.depends_on}, so no weight "
            "matrix equals it; `qd2mora merge` exports the best static approximation and measures it"
        )

    def to_dict(self) -> dict[str, object]:
        """Return plain values; sets become sorted lists so that files compare equal."""
        content = super().to_dict()
        for key in ("core", "attention_rank", "experts"):
            if content[key] is None:  # as adapters from before it have it
                del content[key]
        return {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}

    @classmethod
    def from_recipe(cls, adapter: Adapter, num_tasks: int) -> "MixtureConfig":
        """Build from a recipe's adapter section. Raises InputRefused."""
        if adapter.grow is not None and adapter.start is None:
            raise InputRefused("adapter.grow: goes with adapter.start, whose experts it adds to")
        if adapter.start is not None:
            return cls._from_start(adapter, num_tasks)
        row = find_method(adapter.method)
        content = adapter.model_dump(exclude={"targets", "penalty", "adapters", "start", "grow"}, exclude_none=True)
        content |= experts_given(adapter, row)
        if adapter.penalty is not None:
            if not row.penalties:
                raise InputRefused(f"adapter.penalty: {row.name} has none; name one in adapter.penalties")
            # `adapter.penalty` is the weight of the method's own first penalty; the same kind in adapter.penalties goes
            # before it.
            content["penalties"] = {row.penalties[0].kind: adapter.penalty} | content.get("penalties", {})
        if row.gates.reads_task or _reads_task(content.get("gates")):
            content["num_tasks"] = num_tasks
        targets = adapter.targets or content.pop("targets", None) or list(row.targets)
        config = cls(**content, target_modules=targets, task_type="CAUSAL_LM")
        config._check_aims(num_tasks)
        return config

    @classmethod
    def _from_start(cls, adapter: Adapter, num_tasks: int) -> "MixtureConfig":
        """Build from the adapter that a run goes on from; what the recipe says beside it must be so. InputRefused."""
        assert adapter.start is not None
        settings = start_settings(adapter.start)
        try:
            start = cls(**settings, task_type="CAUSAL_LM")
        except (TypeError, ValueError) as error:
            raise InputRefused(f"{START}: '{adapter.start}': {str(error).splitlines()[0]}") from error
        if adapter.grow is not None:
            start = start._grown(adapter.grow)
        given = adapter.model_fields_set - {"start"}
        if "method" in given and adapter.method != start.method:
            raise InputRefused(
                f"adapter.method: {adapter.method}, but '{adapter.start}' is a {start.method}; leave it out, or make a "
                "mixture of a LoRA first: qd2mora compose upcycle FOLDER --experts N --out OTHER"
            )
        if start.num_tasks is not None and num_tasks > start.num_tasks:
            raise InputRefused(f"data.tasks: {num_tasks}, but '{adapter.start}' tells {start.num_tasks} tasks apart")
        # What is given is read as in any recipe, so that defaults and short forms mean the same.
        told = adapter.model_copy(update={"start": None, "grow": None, "method": start.method})
        asked = cls.from_recipe(told, num_tasks)
        for key in sorted(given - OF_A_RUN - {"method", "adapters", "grow"}):
            name = "target_modules" if key == "targets" else key
            wanted, there = getattr(asked, name), getattr(start, name)
            if not alike(wanted, there):
                raise InputRefused(f"adapter.{key}: {wanted}, but '{adapter.start}' has {there}; leave it out")
        changes: dict[str, Any] = {
            key: getattr(asked, key) for key in ("dropout", "dropout_per_expert") if key in given
        }
        if given & {"penalty", "penalties"}:
            changes["penalties"] = asked.penalties
        return replace(start, **changes)

    def _grown(self, number: int) -> "MixtureConfig":
        """Return the configuration with as many more experts in each bank. Raises InputRefused."""
        is_special = self.allocation is not None or self.row.stages or self.row.placement != "linear"
        if is_special or not self.routers or self.routers.reads_spans:
            raise InputRefused(f"adapter.grow: the experts of {self.method} are not ones that others stand beside")
        ranks = self.ranks
        if ranks is not None:
            assert self.rank is not None
            ranks = [*ranks, *[self.rank] * number]
        down, up = ({"experts": count + number} for count in (self.num_down, self.num_up))
        return replace(self, down=down, up=up, ranks=ranks)

    def as_section(self, adapter: Adapter) -> Adapter:
        """Return a recipe's section with all that this configuration says, as a run's own recipe has it."""
        told = {name: getattr(self, name) for name in Adapter.model_fields if hasattr(self, name)}
        told |= {"start": adapter.start, "grow": adapter.grow, "targets": self.target_modules}
        return Adapter.model_validate({name: value for name, value in told.items() if value is not None})

    def _check_aims(self, num_tasks: int) -> None:
        """Refuse a penalty that aims each task at the expert of its number, with fewer experts."""
        counts = self.row.experts_of(self.num_down, self.num_up, self.rank or 1, self.num_cores)
        experts = min((counts[role] for role in self.routers if counts[role] > 1), default=1)
        if num_tasks > experts and any(each.kind == "router_ce" and each.weight for each in self.routing_penalties):
            raise InputRefused(
                f"adapter.penalties.router_ce: aims each task at an expert of its own; {num_tasks} tasks, {experts} "
                "experts"
            )

    def _check(self, method: Method) -> None:
        assert self.rank is not None and self.alpha is not None
        if self.rank < 1:
            raise InputRefused(f"adapter.rank: {self.rank} will not do: at least 1")
        if not self.alpha > 0:
            raise InputRefused(f"adapter.alpha: {self.alpha} will not do: above 0")
        if not 0 <= self.dropout < 1:
            raise InputRefused(f"adapter.dropout: {self.dropout} will not do: from 0 to below 1")
        for name, bank in (("down", self.down), ("up", self.up)):
            if not isinstance(bank, dict) or set(bank) != {"experts"} or bank["experts"] < 1:
                raise InputRefused(f'adapter.{name}: {bank} will not do: write {{"experts": 4}}')
        sections.check_core(self.core, method)
        sections.check_attention_rank(self.attention_rank, method)
        sections.check_experts(self.experts, method, self.shared)
        check_counts(method, self.num_down, self.num_up)
        self._check_ranks(method)
        self._check_gates(method)
        self._check_task(method)
        sections.check_shared(self.shared)
        given = {"shared": self.shared, "gates": self.gates, "allocation": self.allocation, "penalties": self.penalties}
        sections.check_backend(given, method)
        if self.init not in get_args(DownInit):
            raise InputRefused(f"adapter.init: unknown '{self.init}'; {nearest(str(self.init), get_args(DownInit))}")
        for kind in self.penalties or {}:
            known = [*balance.PENALTIES, *WEIGHT_PENALTIES]
            if kind not in known:
                raise InputRefused(f"adapter.penalties: unknown penalty '{kind}'; {nearest(kind, known)}")
            if kind in balance.PENALTIES and not self.routers:
                raise InputRefused(f"adapter.penalties: {kind} reads a router, and {method.name} has none")
        sections.check_spans(self.routing_penalties, self.routers, method)

    def _check_ranks(self, method: Method) -> None:
        if self.allocation is not None:
            if method.pairing == "chain" and method.gate_up is None:
                raise InputRefused(f"adapter.allocation: {method.name} has one up expert everywhere")
            experts_by_layer(self.allocation, 1 << 16)  # of any depth: the model is not known yet
        sections.check_ranks(self.ranks, self.num_down, method)
        if self.ranks is not None and self.allocation is not None:
            raise InputRefused("adapter.ranks: give ranks or an allocation, not both")

    def _check_gates(self, method: Method) -> None:
        known = {each.name for each in fields(Gate)}
        for role, changes in (self.gates or {}).items():
            if role not in method.gates:
                there = ", ".join(method.gates) or "none"
                raise InputRefused(f"adapter.gates.{role}: {method.name} has no such gate; it has {there}")
            for key in changes:
                if key not in known:
                    raise InputRefused(f"adapter.gates.{role}: unknown field '{key}'; {nearest(key, known)}")
            if changes.get("granularity") == "batch":
                raise InputRefused(
                    f"adapter.gates.{role}.granularity: 'batch' is refused: its mean would let rows see each other"
                )
        counts = method.experts_of(self.num_down, self.num_up, self.rank or 1, self.num_cores)
        # A top-k must find enough experts in the layer that has fewest, but for those that have one and no router.
        if self.allocation is not None:
            several = [count for count in map(int, self.allocation.split("-")) if count > 1]
            counts["up"] = min(several, default=1)
            if method.pairing == "tied":
                counts["down"] = counts["up"]
        for role, gate in self.routers.items():
            check_gate(gate, f"adapter.gates.{role}", role, counts[role])

    def _check_task(self, method: Method) -> None:
        inputs = {gate.input for gate in self.routers.values()}
        if "external" in inputs and (self.external_width is None or self.external_width < 1):
            raise InputRefused(f"adapter.external_width: {method.name} reads a vector of each row; give its width")
        if not inputs & {"task", "task+x"}:
            if self.task_embedding is not None:
                raise InputRefused(f"adapter.task_embedding: {method.name} does not route by task")
            return
        if self.num_tasks is None or self.num_tasks < 1:
            raise InputRefused(f"adapter: {method.name} routes by task and needs num_tasks, at least 1")
        if any(gate.select == "fixed" and gate.input == "task" for gate in self.routers.values()):
            if self.num_tasks > self.num_down:
                raise InputRefused(
                    f"adapter.down.experts: {method.name} gives each task its own expert; {self.num_tasks} tasks, "
                    f"{self.num_down} experts"
                )
        elif self.task_embedding is None or self.task_embedding < 1:
            raise InputRefused(f"adapter.task_embedding: {self.task_embedding} will not do: at least 1")


def _changed(gate: Gate, changes: GateChanges) -> Gate:
    return replace(gate, **changes)  # type: ignore[arg-type]  # `_check_gates` comes after, and looks at what came out


def _reads_task(changes: dict[str, GateChanges] | None) -> bool:
    return any("task" in str(fields.get("input")) for fields in (changes or {}).values())


__all__ = ["MixtureConfig"]
