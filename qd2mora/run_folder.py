"""A run folder: where things lie in it, and how it is opened.

`recipe.yaml` (resolved), `manifest.json`, `adapter/` (PEFT's own layout and a seal), tokenizer files,
`checkpoints/step-N/`, `metrics.jsonl`, `best/`, at the end `routing.json` and `report.html`, and after a merge
`static/` (what exports are made of) and `export/`. While a run goes on, `LOCK`.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qd2mora.adapter_folder import load_adapter
from qd2mora.base import load_base, load_tokenizer
from qd2mora.disk.untrusted import check_adapter
from qd2mora.errors import InputRefused, nearest
from qd2mora.mixture import MixtureConfig
from qd2mora.recipe import Base, Recipe, load_recipe
from qd2mora.routed.gate import Gates
from qd2mora.safekeeping.inventory import check_tokenizer_files

MAY_CHANGE = ("base", "base.quantization")
"""What of a run may differ from its training, where it is asked for by name."""


class RunFolder:
    """Paths of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.manifest = path / "manifest.json"
        self.adapter = path / "adapter"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.best = path / "best"
        self.export = path / "export"
        self.static = path / "static"
        self.routing = path / "routing.json"
        self.scores = path / "scores.json"
        self.earlier_tasks = path / "earlier_tasks.json"
        self.samples = path / "samples.json"
        self.report = path / "report.html"
        self.lock = path / "LOCK"

    @property
    def name(self) -> str:
        """What the run is called: the folder's own name, wherever it is named from."""
        return self.path.resolve().name

    def metric_lines(self) -> list[dict[str, Any]]:
        """Return what a finished run's `metrics.jsonl` says, a line each."""
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]

    def base(self, recipe: Recipe) -> Base:
        """Return a run's base; its 4-bit weights are kept beside the run where the recipe leaves that open."""
        if recipe.base.cache != "auto":
            return recipe.base
        return recipe.base.model_copy(update={"cache": str(self.path.absolute().parent / "quantised")})


@dataclass(frozen=True)
class OpenRun:
    """A trained run in memory: its recipe, the base with the adapter on it, and the tokenizer."""

    folder: RunFolder
    recipe: Recipe
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def clock(self) -> str | None:
        """The time that chat templates read when its rows were made."""
        return clock_of(self.folder)

    @property
    def config(self) -> MixtureConfig | None:
        """The adapter's configuration with the recipe's changes; None for PEFT's own DoRA, which routes nothing."""
        config = self.model.peft_config["default"]
        return config if isinstance(config, MixtureConfig) else None

    @property
    def routers(self) -> Gates:
        """The adapter's routers by role; none where there is no mixture."""
        return Gates() if self.config is None else self.config.routers

    @property
    def vector_width(self) -> int | None:
        """Width of the vector that routers read of each row; None where they read none."""
        if self.config is None or not self.routers.reads_vector:
            return None
        return self.config.external_width


def is_run(path: str | Path) -> bool:
    """Tell whether a folder holds a run."""
    return (Path(path) / "recipe.yaml").is_file()


def clock_of(folder: RunFolder) -> str | None:
    """Return the time that chat templates read when a run's rows were made; None where its manifest does not tell."""
    try:
        content = json.loads(folder.manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    clock = content.get("clock") if isinstance(content, dict) else None
    return clock if isinstance(clock, str) else None


def read_recipe(path: str | Path) -> Recipe:
    """Return the resolved recipe of a run. Raises InputRefused where there is no run."""
    if not is_run(path):
        raise InputRefused(f"'{path}' is not a run folder: it holds no recipe.yaml")
    folder = RunFolder(Path(path))
    recipe = load_recipe(folder.recipe)
    if clock_of(folder) is None:
        return _as_worded_before(recipe)
    return recipe


def _as_worded_before(recipe: Recipe) -> Recipe:
    """Runs from before instructions could have a template name one on every task; it worded conversations alone."""
    tasks = [
        task if task.format == "chat" else task.model_copy(update={"template": None}) for task in recipe.data.tasks
    ]
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"tasks": tasks})})


BaseOf = Callable[[Base, torch.device | None], PreTrainedModel]
"""Returns a model that an adapter may be put on."""


def open_run(
    path: str | Path,
    device: torch.device | None = None,
    *,
    allow_changed: Collection[str] = (),
    base_of: BaseOf = load_base,
) -> OpenRun:
    """Load base, adapter and tokenizer of a run, in evaluation mode.

    `allow_changed`: what may differ from the training, `base` or `base.quantization`. `base_of`: where the base comes
    from, for those that put several adapters on one.

    Raises InputRefused where the base is not the one trained on, DamagedFile where the adapter is not what was written.
    """
    folder = RunFolder(Path(path))
    recipe = read_recipe(path)
    for field in allow_changed:
        if field not in MAY_CHANGE:
            raise InputRefused(f"--allow-changed: unknown '{field}'; {nearest(field, MAY_CHANGE)}")
    if not (folder.adapter / "adapter_model.safetensors").is_file():
        raise InputRefused(f"'{path}' holds no finished adapter; continue it with `qd2mora train RECIPE --resume`")
    # Before a library reads either: since the run ended, its files may have become anybody's.
    check_tokenizer_files(folder.path)
    check_adapter(folder.adapter)
    model = load_adapter(base_of(folder.base(recipe), device), recipe.base, folder.adapter, allow_changed)
    return OpenRun(folder, recipe, model.eval(), load_tokenizer(str(path)))


__all__ = [
    "BaseOf",
    "OpenRun",
    "RunFolder",
    "clock_of",
    "is_run",
    "open_run",
    "read_recipe",
]
