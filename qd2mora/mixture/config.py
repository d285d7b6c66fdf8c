"""MixtureConfig: any method of the table, as a PEFT configuration."""

from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig

from qd2mora.errors import InputRefused
from qd2mora.mixture.ops import RankStep
from qd2mora.mixture.presets import Method, check_counts, find_method
from qd2mora.mixture.registration import QD2MORA
from qd2mora.recipe import Adapter


@dataclass
class MixtureConfig(PeftConfig):
    """A mixture of LoRA on `nn.Linear` or `bnb.nn.Linear4bit`.

    Fields left None take the method's own defaults. `down` and `up` are {"experts": n}. `scaling` is alpha / rank
    (alpha / total rank where the method's code does so). `num_tasks` is needed where a method routes by task.

    Raises InputRefused where the method forbids a value.
    """

    method: str = field(default="d2mora", metadata={"help": "a row of `qd2mora methods`"})
    rank: int | None = field(default=None, metadata={"help": "inner width of one expert"})
    alpha: float | None = field(default=None, metadata={"help": "the update is scaled by alpha / rank"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the input of the down experts"})
    dropout_per_expert: bool = field(default=False, metadata={"help": "one dropout mask per down expert"})
    down: dict[str, int] | None = field(default=None, metadata={"help": '{"experts": M}'})
    up: dict[str, int] | None = field(default=None, metadata={"help": '{"experts": N}'})
    num_tasks: int | None = field(default=None, metadata={"help": "tasks that a task-routed method tells apart"})
    task_embedding: int | None = field(default=None, metadata={"help": "width of the task embedding"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "names, a regex, or 'all-linear'"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "names or a regex to leave out"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "decoder layers to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of layers"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained and saved whole"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = QD2MORA
        method = self.row
        self.rank = method.rank if self.rank is None else self.rank
        self.alpha = method.alpha if self.alpha is None else float(self.alpha)
        self.down = {"experts": method.down} if self.down is None else dict(self.down)
        self.up = {"experts": method.up} if self.up is None else dict(self.up)
        self.task_embedding = method.task_embedding if self.task_embedding is None else self.task_embedding
        self._check(method)

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
        check_counts(method, self.num_down, self.num_up)
        self._check_task(method)

    def _check_task(self, method: Method) -> None:
        if method.task_embedding is None:
            if self.task_embedding is not None:
                raise InputRefused(f"adapter.task_embedding: {method.name} does not route by task")
            return
        if self.num_tasks is None or self.num_tasks < 1:
            raise InputRefused(f"adapter: {method.name} routes by task and needs num_tasks, at least 1")
        if self.task_embedding is None or self.task_embedding < 1:
            raise InputRefused(f"adapter.task_embedding: {self.task_embedding} will not do: at least 1")

    @property
    def row(self) -> Method:
        """The method's row of the table."""
        return find_method(self.method)

    @property
    def num_down(self) -> int:
        assert self.down is not None
        return self.down["experts"]

    @property
    def num_up(self) -> int:
        assert self.up is not None
        return self.up["experts"]

    @property
    def scaling(self) -> float:
        """alpha / rank of one expert, or of all together where the method's code divides by that."""
        assert self.rank is not None and self.alpha is not None
        return self.alpha / (self.rank * self.num_down if self.row.scaling_rank == "total" else self.rank)

    @property
    def step(self) -> RankStep:
        """The method's step in rank space."""
        assert self.rank is not None
        row = self.row
        reads: dict[str, Literal["x", "z"]] = {"x": "x", "z": "z"}
        return RankStep(
            num_down=self.num_down,
            num_up=self.num_up,
            rank=self.rank,
            is_tied=row.pairing == "tied",
            gates_down=row.gate_down is not None and row.pairing == "chain",
            up_reads=reads[row.gate_up.input] if row.gate_up else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; sets become sorted lists so that files compare equal."""
        content = super().to_dict()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}

    @classmethod
    def from_recipe(cls, adapter: Adapter, num_tasks: int) -> "MixtureConfig":
        """Build from a recipe's adapter section. Raises InputRefused."""
        row = find_method(adapter.method)
        return cls(
            method=adapter.method,
            rank=adapter.rank,
            alpha=adapter.alpha,
            dropout=adapter.dropout,
            dropout_per_expert=adapter.dropout_per_expert,
            down=adapter.down.model_dump() if adapter.down else None,
            up=adapter.up.model_dump() if adapter.up else None,
            num_tasks=num_tasks if row.task_embedding is not None else None,
            task_embedding=adapter.task_embedding,
            target_modules=adapter.targets,
            task_type="CAUSAL_LM",
        )


__all__ = ["MixtureConfig"]
