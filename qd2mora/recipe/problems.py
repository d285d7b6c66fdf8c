"""What is wrong with a recipe, in one line: key, value, and what would do; a neighbour's name is answered by ours."""

import difflib
import re
from collections.abc import Sequence

from pydantic import BaseModel, ValidationError

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

MOST_NAMED = 20
"""Unknown keys that one line names."""


def first_problem(error: ValidationError, schema: type[BaseModel]) -> str:
    """One line for the most telling of pydantic's complaints: unknown keys, all of them, explain what is missing."""
    problems = error.errors()
    unknown = dict.fromkeys(problem["loc"] for problem in problems if problem["type"] == "extra_forbidden")
    if unknown:
        return _unknown_keys(list(unknown), schema)
    problem = problems[0]
    # Literal and type tags in the location belong to unions, not to the recipe.
    tag = re.compile(r"[\[(]|^(int|str|float|bool)$|^constrained")
    key = dotted([part for part in problem["loc"] if not tag.search(str(part))])
    if problem["type"] == "missing":
        return f"{key} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    shown = problem["input"]
    if problem["type"] == "value_error" and not key:
        return message
    if problem["type"] == "value_error":
        return f"{key}: {message}"
    return f"{key}: {_short(shown)} will not do: {message}"


def _short(value: object) -> str:
    text = repr(value)
    if len(text) <= 60:
        return text
    return text[:57] + "..."


def dotted(location: Sequence[str | int]) -> str:
    """Return a place in a recipe as people write it: data.tasks.0.path."""
    parts = [str(part) for part in location]
    return ".".join(part if part.isprintable() and len(part) <= 60 else _short(part) for part in parts)


def _unknown_keys(places: list[tuple[str | int, ...]], schema: type[BaseModel]) -> str:
    """Name every unknown key with what would do; of very many the first ones."""
    known = sorted(set(_key_names(schema)))
    if len(places) == 1:
        return f"unknown key {dotted(places[0])}; {_instead(places[0], known) or _those_of(places[0], known)}"
    named = [f"{dotted(place)} ({_instead(place, known) or 'no such key'})" for place in places[:MOST_NAMED]]
    if len(places) > MOST_NAMED:
        named.append(f"and {len(places) - MOST_NAMED} more")
    line = f"{len(places)} unknown keys: {', '.join(named)}"
    if sum(str(place[-1]) in NEIGHBOURS for place in places) > 2:
        line += "; `qd2mora recipes --from axolotl|llama-factory FILE` translates a neighbour's file"
    return line


def _instead(place: tuple[str | int, ...], known: list[str]) -> str | None:
    """Return what a key is called here, or what it is near to; None where it is like none."""
    name = str(place[-1])
    if name in NEIGHBOURS:
        return f"here it is {NEIGHBOURS[name]}"
    if "." in name and name in known:
        return f"in a file '{name.rpartition('.')[2]}' stands inside '{name.rpartition('.')[0]}'"
    # Of keys of one name the outer is meant: few write a stage before they have written steps.
    outer_first = sorted(known, key=lambda full: full.count("."))
    for candidates, cutoff in ((_keys_beside(place, known), 0.5), (outer_first, 0.7)):
        last_parts = [full.rpartition(".")[2] for full in candidates]
        near = difflib.get_close_matches(name, last_parts, 1, cutoff)
        if near:
            return f"did you mean {candidates[last_parts.index(near[0])]}?"
    return None


def _those_of(place: tuple[str | int, ...], known: list[str]) -> str:
    return f"the keys here are {', '.join(full.rpartition('.')[2] for full in _keys_beside(place, known))}"


def _keys_beside(place: tuple[str | int, ...], known: list[str]) -> list[str]:
    section = ".".join(part for part in place[:-1] if isinstance(part, str))
    return [full for full in known if full.rpartition(".")[0] == section]


def _key_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        for part in _nested(field.annotation):
            names += _key_names(part, f"{prefix}{name}.")
    return names


def _nested(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    arguments = getattr(annotation, "__args__", ())
    return [part for argument in arguments for part in _nested(argument)]


__all__ = ["NEIGHBOURS", "dotted", "first_problem"]
