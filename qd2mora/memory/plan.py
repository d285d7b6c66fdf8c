"""The plan: what the recipe leaves open, chosen for the fastest run that fits the memory, with the reason for each.

Recomputing a layer's activations costs about a third of a step, a smaller micro batch costs less; so a plan without
recomputing is taken where a micro batch of at least PREFERRED tokens fits, else the largest micro batch with it.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from qd2mora.base import base_config, compute_dtype
from qd2mora.errors import InputRefused
from qd2mora.memory.ledger import Setting, Shapes, adapter_tensors, ledger, read_shapes
from qd2mora.mixture import MixtureConfig
from qd2mora.recipe import Recipe

GIB = 1 << 30
UNITS = {"GiB": GIB, "MiB": 1 << 20, "GB": 10**9, "MB": 10**6}
LARGEST_MICRO_BATCH = 16
PREFERRED_TOKENS = 512
"""Below this a GPU is not busy, and recomputing a larger micro batch is the faster plan."""
ENOUGH_WITHOUT_BUDGET = 2 * GIB
"""Activations that are kept without asking where no budget is named and none can be read."""


@dataclass(frozen=True)
class Choice:
    """A value and why."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Plan:
    """The memory of a run, item by item in bytes, and what was chosen."""

    items: dict[str, int]
    choices: dict[str, Choice]
    micro_batch: int
    checkpointing: bool
    trainable_parameters: int
    budget_bytes: int | None
    ways_out: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        return sum(self.items.values())

    @property
    def fits(self) -> bool:
        return self.budget_bytes is None or self.peak_bytes <= self.budget_bytes

    def to_json(self) -> dict[str, Any]:
        """Return what `plan --json` prints."""
        return {
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
            "budget_bytes": self.budget_bytes,
            "items": self.items,
            "choices": {key: {"value": choice.value, "reason": choice.reason} for key, choice in self.choices.items()},
            "trainable_parameters": self.trainable_parameters,
            "ways_out": list(self.ways_out),
        }


def plan(recipe: Recipe, budget: str | int | None = None, device: torch.device | None = None) -> Plan:
    """Plan a run for a budget (bytes or "8GiB"; else the recipe's, else what is free there), reading no weights.

    Without a `device` a GPU is planned for, in bfloat16 unless the recipe says otherwise; rows are taken to be
    `data.max_length` long. Raises InputRefused.
    """
    device = device or torch.device("cuda")
    adapter = MixtureConfig.from_recipe(recipe.adapter, len(recipe.data.tasks))
    shapes = read_shapes(base_config(recipe.base), adapter)
    limit, source = _limit(recipe, budget, device)
    candidates = [
        Setting(micro_batch, checkpointing, _dtype(recipe, device), device.type == "cuda")
        for micro_batch in _micro_batches(recipe)
        for checkpointing in _checkpointing(recipe)
    ]
    candidates.sort(key=lambda setting: _cost(setting, recipe))
    chosen = next((each for each in candidates if _fits(shapes, adapter, recipe, each, limit)), None)
    final = chosen or min(candidates, key=lambda each: sum(ledger(shapes, adapter, recipe, each).values()))
    return Plan(
        items=ledger(shapes, adapter, recipe, final),
        choices=_choices(recipe, final, limit, source),
        micro_batch=final.micro_batch,
        checkpointing=final.checkpointing,
        trainable_parameters=sum(adapter_tensors(shapes, adapter)),
        budget_bytes=limit,
        ways_out=() if chosen else _ways_out(recipe, shapes, adapter, final),
    )


def parse_size(text: str) -> int:
    """Return the bytes of "8GiB", "500 MB" and the like. Raises InputRefused."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GiB|MiB|GB|MB)", text.strip())
    if not match:
        raise InputRefused(f"budget '{text}': write a number and a unit, for example 8GiB ({', '.join(UNITS)})")
    return int(float(match[1]) * UNITS[match[2]])


def render(planned: Plan) -> Table:
    """Return the plan as a table: items with bars, the total, and the choices with their reasons."""
    table = Table(title=f"{planned.trainable_parameters:,} trainable parameters", show_edge=False)
    table.add_column("item")
    table.add_column("GiB", justify="right")
    table.add_column("")
    largest = max(planned.items.values())
    for name, size in planned.items.items():
        table.add_row(name, f"{size / GIB:.3f}", "█" * round(24 * size / largest))
    verdict = ""
    if planned.budget_bytes is not None:
        verdict = f"{'fits' if planned.fits else 'does not fit'} {planned.budget_bytes / GIB:.2f} GiB"
    table.add_row("peak", f"{planned.peak_bytes / GIB:.3f}", verdict, style="bold")
    table.add_section()
    for key, choice in planned.choices.items():
        table.add_row(key, str(choice.value), choice.reason)
    for way in planned.ways_out:
        table.add_row("way out", "", way)
    return table


def _limit(recipe: Recipe, budget: str | int | None, device: torch.device) -> tuple[int | None, str]:
    if budget is not None:
        return (parse_size(budget) if isinstance(budget, str) else budget), "the budget given"
    if recipe.memory.budget is not None:
        return parse_size(recipe.memory.budget), "memory.budget"
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.mem_get_info(device)[0], "what is free on the device"
    return None, "no budget named"


def _dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    if device.type == "cuda" and not torch.cuda.is_available() and recipe.base.compute_dtype == "auto":
        return torch.bfloat16
    return compute_dtype(recipe.base, device)


def _micro_batches(recipe: Recipe) -> list[int]:
    asked, rows = recipe.train.micro_batch, recipe.train.global_batch
    if isinstance(asked, int):
        return [asked]
    return [size for size in range(min(rows, LARGEST_MICRO_BATCH), 0, -1) if rows % size == 0]


def _checkpointing(recipe: Recipe) -> list[bool]:
    return {"on": [True], "off": [False], "auto": [False, True]}[recipe.memory.checkpointing]


def _cost(setting: Setting, recipe: Recipe) -> tuple[float, int]:
    """Order plans by predicted time a token: recomputing costs a third, a micro batch below PREFERRED_TOKENS idles."""
    tokens = setting.micro_batch * recipe.data.max_length
    idle = max(1.0, PREFERRED_TOKENS / tokens) ** 0.5
    return (4 / 3 if setting.checkpointing else 1.0) * idle, -setting.micro_batch


def _fits(shapes: Shapes, adapter: MixtureConfig, recipe: Recipe, setting: Setting, limit: int | None) -> bool:
    items = ledger(shapes, adapter, recipe, setting)
    if limit is None:
        return items.get("activations", 0) <= ENOUGH_WITHOUT_BUDGET
    return sum(items.values()) <= limit


def _choices(recipe: Recipe, setting: Setting, limit: int | None, source: str) -> dict[str, Choice]:
    room = f"fits {limit / GIB:.2f} GiB ({source})" if limit is not None else source
    micro = f"largest divisor of global_batch up to {LARGEST_MICRO_BATCH} for which the plan {room}"
    keep = "recomputed: keeping activations would not fit" if setting.checkpointing else f"kept: {room}"
    dtype = str(setting.dtype).removeprefix("torch.")
    where = "a GPU" if setting.on_gpu else "a CPU"
    return {
        "train.micro_batch": Choice(
            setting.micro_batch, "as the recipe says" if recipe.train.micro_batch != "auto" else micro
        ),
        "memory.checkpointing": Choice(
            "on" if setting.checkpointing else "off",
            "as the recipe says" if recipe.memory.checkpointing != "auto" else keep,
        ),
        "base.compute_dtype": Choice(
            dtype, "as the recipe says" if recipe.base.compute_dtype != "auto" else f"planned for {where}"
        ),
    }


def _ways_out(recipe: Recipe, shapes: Shapes, adapter: MixtureConfig, setting: Setting) -> tuple[str, ...]:
    """Name the changes that save most, with what they save."""
    now = sum(ledger(shapes, adapter, recipe, setting).values())
    train, data, memory = recipe.train, recipe.data, recipe.memory
    changed = {
        "train.micro_batch=1": recipe.model_copy(update={"train": train.model_copy(update={"micro_batch": 1})}),
        "memory.checkpointing=on": recipe.model_copy(
            update={"memory": memory.model_copy(update={"checkpointing": "on"})}
        ),
        f"data.max_length={data.max_length // 2}": recipe.model_copy(
            update={"data": data.model_copy(update={"max_length": data.max_length // 2})}
        ),
        "train.optimizer=adamw_8bit": recipe.model_copy(
            update={"train": train.model_copy(update={"optimizer": "adamw_8bit"})}
        ),
        "base.double_quant=true base.quantization=nf4": recipe.model_copy(
            update={"base": recipe.base.model_copy(update={"double_quant": True, "quantization": "nf4"})}
        ),
    }
    savings = {}
    for words, other in changed.items():
        smallest = Setting(
            min(setting.micro_batch, _micro_batches(other)[-1]),
            setting.checkpointing or words == "memory.checkpointing=on",
            setting.dtype,
            setting.on_gpu,
        )
        savings[words] = now - sum(ledger(shapes, adapter, other, smallest).values())
    best = sorted((words for words in savings if savings[words] > 0), key=lambda words: -savings[words])
    return tuple(f"{words} saves {savings[words] / GIB:.2f} GiB" for words in best[:3])


__all__ = ["Choice", "Plan", "parse_size", "plan", "render"]
