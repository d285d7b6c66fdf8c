"""The plan: what the recipe leaves open, chosen for the fastest run that fits the memory, with the reason for each.

Predicted time a token: a frozen base takes two passes over its weights, forward and backward, and a third where layers
are recomputed; each pass has work that does not grow with tokens (every weight is dequantised, kernels are launched),
worth FIXED_TOKENS tokens. So keeping activations wins wherever its micro batch is not much the smaller.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qd2mora.base import base_config, compute_dtype, default_device
from qd2mora.errors import InputRefused
from qd2mora.memory.ledger import Ledger, Setting, Shapes, ledger, read_shapes
from qd2mora.mixture import MixtureConfig
from qd2mora.recipe import Recipe

GIB = 1 << 30
UNITS = {"GiB": GIB, "MiB": 1 << 20, "GB": 10**9, "MB": 10**6}
LARGEST_MICRO_BATCH = 8
FIXED_TOKENS = 256
KEPT_WITHOUT_BUDGET = GIB
"""Activations that are kept without asking where no budget is named and none can be read."""
LEAST_SAVING = 1 << 20

Changes = dict[str, dict[str, Any]]
"""Section to key to value, as overrides of a recipe."""


@dataclass(frozen=True)
class Choice:
    """A value and why."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Plan:
    """The memory of a run in bytes, and what was chosen.

    `items` are alive at the peak and sum up to it; `elsewhere` are the items of a step's other moments. Where nothing
    fits, this is the smallest plan, and `ways_out` are changes of the recipe with what they save.
    """

    items: dict[str, int]
    elsewhere: dict[str, int]
    choices: dict[str, Choice]
    micro_batch: int
    checkpointing: bool
    trainable_parameters: int
    budget_bytes: int | None
    ways_out: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """The most that is alive at once."""
        return sum(self.items.values())

    @property
    def shortfall_bytes(self) -> int:
        """How far the peak is above the budget; 0 where it fits."""
        return 0 if self.budget_bytes is None else max(0, self.peak_bytes - self.budget_bytes)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the budget, or there is none."""
        return self.shortfall_bytes == 0

    def to_json(self) -> dict[str, Any]:
        """Return what `plan --json` prints."""
        return {
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
            "budget_bytes": self.budget_bytes,
            "shortfall_bytes": self.shortfall_bytes,
            "items": self.items,
            "elsewhere": self.elsewhere,
            "choices": {key: {"value": choice.value, "reason": choice.reason} for key, choice in self.choices.items()},
            "trainable_parameters": self.trainable_parameters,
            "ways_out": list(self.ways_out),
        }


def plan(recipe: Recipe, budget: str | int | None = None, device: torch.device | None = None) -> Plan:
    """Plan a run for a budget (bytes or "8GiB"; else the recipe's, else what is free there), reading no weights.

    Without a `device` a GPU is planned for, in bfloat16 unless the recipe says otherwise or the GPU here is older; a
    CPU passed explicitly is planned for as it runs, in float32. Rows are taken to be `data.max_length` long.

    Raises InputRefused.
    """
    limit, source = _limit(recipe, budget, device)
    shapes = _shapes(recipe)
    chosen, is_within = _choose(shapes, recipe, device, limit)
    written = ledger(shapes, recipe, chosen)
    return Plan(
        items=written.items,
        elsewhere=written.elsewhere,
        choices=_choices(recipe, chosen, limit, source, is_within),
        micro_batch=chosen.micro_batch,
        checkpointing=chosen.checkpointing,
        trainable_parameters=sum(shapes.trainable),
        budget_bytes=limit,
        ways_out=() if is_within or limit is None else _ways_out(recipe, shapes, device, limit, written),
    )


def parse_size(text: str) -> int:
    """Return the bytes of "8GiB", "500 MB" and the like. Raises InputRefused."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GiB|MiB|GB|MB)", text.strip(), re.ASCII)
    if not match:
        raise InputRefused(f"budget: '{text}' will not do: a number and a unit ({', '.join(UNITS)}), for example 8GiB")
    return int(float(match[1]) * UNITS[match[2]])


def predicted_cost(setting: Setting, max_length: int) -> float:
    """Return the predicted time of a token, in passes over it on a busy device."""
    passes = 3 if setting.checkpointing else 2
    return passes * (1 + FIXED_TOKENS / (setting.micro_batch * max_length))


def _limit(recipe: Recipe, budget: str | int | None, device: torch.device | None) -> tuple[int | None, str]:
    if budget is not None:
        return (parse_size(budget) if isinstance(budget, str) else budget), "the budget given"
    if recipe.memory.budget is not None:
        return parse_size(recipe.memory.budget), "memory.budget"
    device = device or default_device()
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.mem_get_info(device)[0], "what is free on the device"
    return None, "no budget named"


def _shapes(recipe: Recipe) -> Shapes:
    return read_shapes(base_config(recipe.base), MixtureConfig.from_recipe(recipe.adapter, len(recipe.data.tasks)))


def _dtype(recipe: Recipe, device: torch.device | None) -> torch.dtype:
    is_elsewhere = not torch.cuda.is_available() and (device is None or device.type == "cuda")
    if is_elsewhere and recipe.base.compute_dtype == "auto":
        return torch.bfloat16
    return compute_dtype(recipe.base, device or default_device())


def _choose(shapes: Shapes, recipe: Recipe, device: torch.device | None, limit: int | None) -> tuple[Setting, bool]:
    """Return the fastest setting that fits, or the smallest, and whether it fits."""
    dtype, on_gpu = _dtype(recipe, device), device is None or device.type == "cuda"
    settings = [
        Setting(micro_batch, checkpointing, dtype, on_gpu)
        for micro_batch in _micro_batches(recipe)
        for checkpointing in {"on": [True], "off": [False], "auto": [False, True]}[recipe.memory.checkpointing]
    ]
    if limit is None:
        return _without_limit(shapes, recipe, settings), True
    settings.sort(key=lambda setting: predicted_cost(setting, recipe.data.max_length))
    peaks = {setting: ledger(shapes, recipe, setting).peak_bytes for setting in settings}
    fitting = [setting for setting in settings if peaks[setting] <= limit]
    return (fitting[0], True) if fitting else (min(settings, key=lambda setting: peaks[setting]), False)


def _without_limit(shapes: Shapes, recipe: Recipe, settings: list[Setting]) -> Setting:
    """Take the largest micro batch, and keep activations where the recipe says so or they are small."""
    largest = max(setting.micro_batch for setting in settings)
    keeping, *recomputing = sorted(
        (setting for setting in settings if setting.micro_batch == largest), key=lambda setting: setting.checkpointing
    )
    items = ledger(shapes, recipe, keeping)
    activations = (items.items | items.elsewhere).get("activations", 0)
    return recomputing[0] if recomputing and activations > KEPT_WITHOUT_BUDGET else keeping


def _micro_batches(recipe: Recipe) -> list[int]:
    asked, rows = recipe.train.micro_batch, recipe.train.global_batch
    if isinstance(asked, int):
        return [asked]
    return [size for size in range(min(rows, LARGEST_MICRO_BATCH), 0, -1) if rows % size == 0]


def _choices(recipe: Recipe, chosen: Setting, limit: int | None, source: str, is_within: bool) -> dict[str, Choice]:
    stated = "as the recipe says"
    room = f"{(KEPT_WITHOUT_BUDGET if limit is None else limit) / GIB:.2f} GiB ({source})"
    if not is_within:
        micro = keep = f"smallest plan; nothing fits {room}"
    else:
        largest = f"the largest divisor of global_batch up to {LARGEST_MICRO_BATCH}; {source}"
        micro = largest if limit is None else f"fastest plan that fits {room}"
        dropped = f"the activations of this micro batch do not fit {room}"
        keep = dropped if chosen.checkpointing else f"the activations fit {room}, and recomputing costs a third"
    dtype = str(chosen.dtype).removeprefix("torch.")
    where = "a GPU" if chosen.on_gpu else "a CPU"
    return {
        "train.micro_batch": Choice(chosen.micro_batch, micro if recipe.train.micro_batch == "auto" else stated),
        "memory.checkpointing": Choice(
            "on" if chosen.checkpointing else "off", keep if recipe.memory.checkpointing == "auto" else stated
        ),
        "base.compute_dtype": Choice(
            dtype, f"planned for {where}" if recipe.base.compute_dtype == "auto" else f"{stated}, on {where}"
        ),
    }


def _ways_out(
    recipe: Recipe, shapes: Shapes, device: torch.device | None, limit: int, smallest: Ledger
) -> tuple[str, ...]:
    """Name up to three changes, the cheapest to the user first, with what each saves and whether it is enough."""

    def peak(changed: Recipe) -> int:
        now = shapes if changed.adapter == recipe.adapter else _shapes(changed)
        return ledger(now, changed, _choose(now, changed, device, limit)[0]).peak_bytes

    ways, together = [], recipe
    for changes in [*_exact_changes(), _shorter(recipe, peak, limit), *_smaller_adapters(recipe, shapes)]:
        now = peak(_changed(recipe, changes))
        saved = smallest.peak_bytes - now
        if saved >= LEAST_SAVING:
            enough = "enough" if now <= limit else "not enough alone"
            ways.append((now > limit, f"{_as_overrides(changes)} saves {saved / GIB:.2f} GiB, {enough}"))
            together = _changed(together, changes)
    least = peak(together)
    if least > limit:
        needs = f"all savings known here together still need {least / GIB:.2f} GiB: a smaller base or a larger card"
        return (*(words for _, words in ways[:2]), needs)
    ways.sort(key=lambda way: way[0])
    return tuple(words for _, words in ways[:3])


def _exact_changes() -> list[Changes]:
    """Return what leaves the learning as it is, or nearly: by what it costs in speed, then in precision."""
    return [
        {"train": {"micro_batch": 1}},
        {"memory": {"checkpointing": "on"}},
        {"train": {"optimizer": "adamw_8bit"}},
        {"base": {"double_quant": True}},
        {"base": {"quantization": "nf4"}},
    ]


def _shorter(recipe: Recipe, peak: Callable[[Recipe], int], limit: int) -> Changes:
    """Return the longest rows that fit, in eighths of what is asked; half where none does."""
    lengths = [max(8, recipe.data.max_length * eighths // 64 * 8) for eighths in range(7, 0, -1)]
    tried: list[Changes] = [{"data": {"max_length": length}} for length in lengths]
    return next((changes for changes in tried if peak(_changed(recipe, changes)) <= limit), tried[3])


def _smaller_adapters(recipe: Recipe, shapes: Shapes) -> list[Changes]:
    rank = MixtureConfig.from_recipe(recipe.adapter, len(recipe.data.tasks)).rank or 1
    changes: list[Changes] = [{"adapter": {"rank": max(1, rank // 2)}}]
    kinds = {linear.name.rpartition(".")[2] for linear in shapes.linears}
    targets = MixtureConfig.from_recipe(recipe.adapter, len(recipe.data.tasks)).target_modules
    asked = kinds if targets == "all-linear" else set(targets or ())
    few = {"q_proj", "v_proj"}
    return [*changes, {"adapter": {"targets": sorted(few)}}] if few < asked and few <= kinds else changes


def _changed(recipe: Recipe, changes: Changes) -> Recipe:
    sections = {name: getattr(recipe, name).model_copy(update=keys) for name, keys in changes.items()}
    return recipe.model_copy(update=sections)


def _as_overrides(changes: Changes) -> str:
    """Write changes as a command line takes them."""
    plain = {
        f"{section}.{key}": json.dumps(value, separators=(",", ":")).replace('"', "")
        for section, keys in changes.items()
        for key, value in keys.items()
    }
    return " ".join(f"{key}={value}" for key, value in plain.items())


__all__ = ["Choice", "Plan", "parse_size", "plan", "predicted_cost"]
