"""The recipe: everything a run depends on, typed and strict.

An unknown key is an error that names the nearest right one; a neighbour's name (`lora_r`, `cutoff_len`) is an error
that names ours. Nothing here looks at devices, models or data.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from qd2mora.errors import InputRefused
from qd2mora.recipe_adapter import Adapter, Count, Experts, Place, Section
from qd2mora.recipe_data import Data, Task
from qd2mora.recipe_file import apply_override, dump_yaml, read_mapping
from qd2mora.recipe_memory import Memory
from qd2mora.redact import secret_in

MAX_TEXT = 4096

# Names that users of neighbouring tools will type, and what they are called here.
NEIGHBOURS = {
    "base_model": "base.model",
    "model_name_or_path": "base.model",
    "load_in_4bit": "base.quantization: nf4",
    "lora_r": "adapter.rank",
    "r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target_modules": "adapter.targets",
    "target_modules": "adapter.targets",
    "num_experts": "adapter.up.experts",
    "datasets": "data.tasks",
    "dataset": "data.tasks",
    "data_path": "data.tasks[].path",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "train_on_inputs": "data.mask_prompt (its opposite)",
    "val_set_size": "data.tasks[].validation",
    "micro_batch_size": "train.micro_batch",
    "per_device_train_batch_size": "train.micro_batch",
    "batch_size": "train.global_batch",
    "gradient_accumulation_steps": "train.global_batch (accumulation = global_batch / micro_batch)",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "optim": "train.optimizer",
    "warmup_ratio": "train.warmup_steps",
    "save_steps": "train.save_every",
    "eval_steps": "train.eval_every",
    "gradient_checkpointing": "memory.checkpointing",
    "output_dir": "output",
}


# Keys of `train` that leave the trained weights as they are.
HARMLESS = (
    *("save_every", "eval_every", "keep_checkpoints", "keep_best"),
    *("log_every", "trackers", "micro_batch", "time_limit"),
)


class Base(Section):
    """The frozen model."""

    model: Place
    """A folder, a hub id, or `random:SHAPE` (random weights of a named shape, for planning and benches)."""
    quantization: Literal["nf4", "none"] = "nf4"
    """`nf4`: bitsandbytes 4-bit linears; `none`: weights in the compute dtype."""
    double_quant: bool = True
    """Quantise the block maxima too: 4.127 instead of 4.5 bits a weight."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 where the device is fast at it, else float16 on a GPU and float32 on a CPU."""
    cache: Literal["auto", "none"] | Place = "auto"
    """A folder that keeps 4-bit weights, so that a later start need not quantise again; `auto`: `quantised/` beside the
    run, from half a GiB on; `none`."""


class Train(Section):
    """How it is learned."""

    steps: Count | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    micro_batch: Count | Literal["auto"] = "auto"
    """Rows in one forward pass; the result does not depend on it."""
    global_batch: Count = 16
    """Rows in one optimiser step."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    optimizer: Literal["auto", "adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """`auto`: adamw where the budget allows it, else adamw_8bit; decided before step 1 and then part of the run."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """The gradient of a step is scaled down to this norm; null: never."""
    seed: Annotated[int, Field(ge=0)] = 0
    save_every: Count = 100
    eval_every: Count = 100
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """At least two, so that there is a way back where the newest is damaged."""
    time_limit: Annotated[str, Field(pattern=r"^\d+(\.\d+)? ?(s|min|h)$")] | None = None
    """Save and stop (exit 75) before so much time is over, for example 11.5h."""
    early_stopping: Count | None = None
    """Stop after so many evaluations in a row without a better one overall; null: never."""
    keep_best: Literal["none", "overall", "tasks"] = "overall"
    """Which best adapters `best/` keeps a copy of: of the whole, or of every task too."""
    final: Literal["last", "best"] = "last"
    """What `adapter/` holds at the end: the adapter of the last step, or the best overall."""
    log_every: Count = 1
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim"]] = Field(default=[])

    @model_validator(mode="after")
    def _one_length(self) -> "Train":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give either steps or epochs")
        if isinstance(self.micro_batch, int) and self.global_batch % self.micro_batch:
            raise ValueError(f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch}")
        if self.final == "best" and self.keep_best == "none":
            raise ValueError("final: best needs keep_best: overall or tasks")
        return self


class Finish(Section):
    """What happens after the last step."""

    export: bool = False
    """Merge into an fp16 folder `export/` in the run folder."""
    score: bool = False
    """Answer the held-out rows with the base, the adapter and the export, and print the accuracy per task."""


class Recipe(Section):
    """A run, whole."""

    base: Base
    adapter: Adapter = Adapter()
    data: Data
    train: Train
    memory: Memory = Memory()
    finish: Finish = Finish()
    output: Place

    @model_validator(mode="after")
    def _has_one_end(self) -> "Recipe":
        ends = [self.train.steps, self.train.epochs, self.data.stop]
        if sum(end is not None for end in ends) != 1:
            raise ValueError("give one of train.steps, train.epochs and data.stop")
        return self

    def dump_yaml(self) -> str:
        """Return the recipe as YAML that loads back equal."""
        return dump_yaml(self.model_dump(mode="json"))

    def deciding(self) -> dict[str, Any]:
        """Return the sections without the keys that leave the trained weights as they are."""
        content = self.model_dump(mode="json", exclude={"output": True, "memory": True, "finish": True})
        del content["base"]["cache"]
        is_judged = self.train.early_stopping is not None or self.train.final == "best"
        for key in HARMLESS:
            if not (is_judged and key == "eval_every"):
                del content["train"][key]
        for task in content["data"]["tasks"]:
            if not is_judged:
                del task["metric"]
        return content

    def fingerprint(self) -> str:
        """Return a hash of everything that decides the trained weights."""
        return hashlib.sha256(json.dumps(self.deciding(), sort_keys=True).encode()).hexdigest()


def load_recipe(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Load a recipe file and apply dotted `key=value` overrides.

    Relative paths of base and data are taken beside the recipe where they exist there, else from the working folder.

    Raises InputRefused (one line: file, key, value, what would do).
    """
    path = Path(path)
    content = read_mapping(path)
    for override in overrides:
        apply_override(content, override)
    return _anchored(parse_recipe(content, str(path)), path.parent)


def parse_recipe(content: Any, where: str = "recipe") -> Recipe:
    """Check a plain mapping. Raises InputRefused."""
    _refuse_texts(content, where, ())
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise InputRefused(f"{where}: {_first_problem(error)}") from None


def _anchored(recipe: Recipe, folder: Path) -> Recipe:
    def anchor(text: str) -> str:
        beside = folder / text
        # os.path: an impossible name (too long, say) is not there, where Path.exists raises.
        return str(beside.resolve()) if not Path(text).is_absolute() and os.path.exists(beside) else text

    tasks = []
    for task in recipe.data.tasks:
        held_out = anchor(task.validation) if isinstance(task.validation, str) else task.validation
        tasks.append(task.model_copy(update={"path": anchor(task.path), "validation": held_out}))
    base = recipe.base.model_copy(update={"model": anchor(recipe.base.model)})
    return recipe.model_copy(update={"base": base, "data": recipe.data.model_copy(update={"tasks": tasks})})


def _refuse_texts(node: Any, where: str, location: tuple[str | int, ...]) -> None:
    """Refuse a text that holds a secret, in a value or a key, or that is too long to be anything here."""
    if isinstance(node, dict | list):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(key, str):
                _refuse_texts(key, where, (*location, "a key"))
            _refuse_texts(child, where, (*location, key))
    elif isinstance(node, str):
        if len(node) > MAX_TEXT:
            raise InputRefused(f"{where}: {_dotted(location)}: {len(node)} characters (limit {MAX_TEXT})")
        kind = secret_in(node)
        if kind:
            raise InputRefused(
                f"{where}: {_dotted(location)} holds {kind}; a recipe holds no secrets, they come from the "
                "environment (HF_TOKEN, WANDB_API_KEY)"
            )


def _first_problem(error: ValidationError) -> str:
    """One line for the most telling of pydantic's complaints: an unknown key explains what is missing."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    if problem["type"] == "extra_forbidden":
        return _unknown_key(problem["loc"])
    # Literal and type tags in the location belong to unions, not to the recipe.
    tag = re.compile(r"[\[(]|^(int|str|float|bool)$|^constrained")
    key = _dotted([part for part in problem["loc"] if not tag.search(str(part))])
    if problem["type"] == "missing":
        return f"{key} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    shown = problem["input"]
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {_short(shown)} will not do: {message}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _dotted(location: Sequence[str | int]) -> str:
    parts = [str(part) for part in location]
    return ".".join(part if part.isprintable() and len(part) <= 60 else _short(part) for part in parts)


def _unknown_key(location: Sequence[str | int]) -> str:
    key, name = _dotted(location), str(location[-1])
    if name in NEIGHBOURS:
        return f"unknown key {key}; here it is {NEIGHBOURS[name]}"
    known = sorted(set(_key_names(Recipe)))
    if "." in name and name in known:
        return f"unknown key {key}; in a file '{name.rpartition('.')[2]}' stands inside '{name.rpartition('.')[0]}'"
    section = ".".join(part for part in location[:-1] if isinstance(part, str))
    here = [full for full in known if full.rpartition(".")[0] == section]
    for candidates, cutoff in ((here, 0.5), (known, 0.7)):
        last_parts = [full.rpartition(".")[2] for full in candidates]
        near = difflib.get_close_matches(name, last_parts, 1, cutoff)
        if near:
            return f"unknown key {key}; did you mean {candidates[last_parts.index(near[0])]}?"
    return f"unknown key {key}; the keys here are {', '.join(full.rpartition('.')[2] for full in here)}"


def _key_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        for part in _nested(field.annotation):
            names += _key_names(part, f"{prefix}{name}.")
    return names


def _nested(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    arguments = getattr(annotation, "__args__", ())
    return [part for argument in arguments for part in _nested(argument)]


__all__ = [
    "Adapter",
    "Base",
    "Data",
    "Experts",
    "Finish",
    "Memory",
    "Recipe",
    "Task",
    "Train",
    "load_recipe",
    "parse_recipe",
]
