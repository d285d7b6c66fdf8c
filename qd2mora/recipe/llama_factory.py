"""LLaMA-Factory's keys, as recipes name them; its `dataset_info.json` tells where rows lie and how they are called."""

import json
from collections.abc import Mapping
from pathlib import Path

from qd2mora.recipe.axolotl import EIGHT_BIT, OPTIMIZERS, SCHEDULES
from qd2mora.recipe.translation import (
    Key,
    Neighbour,
    NoCounterpart,
    Sources,
    Value,
    flag,
    names,
    number,
    one_of,
    only_if,
    task_name,
    unlike,
    whole,
)

KEYS = {
    "model_name_or_path": Key("base.model"),
    "quantization_bit": Key("base.quantization", one_of({"4": "nf4", "none": "none"}, EIGHT_BIT)),
    "double_quantization": Key("base.double_quant", flag),
    "bf16": Key("base.compute_dtype", only_if(True, "bfloat16", "that is so where nothing else is asked for")),
    "fp16": Key("base.compute_dtype", only_if(True, "float16", "that is so where nothing else is asked for")),
    "finetuning_type": Key("adapter.method", one_of({"lora": "lora"}, "adapters are what is trained here")),
    "lora_rank": Key("adapter.rank", whole),
    "lora_alpha": Key("adapter.alpha", number),
    "lora_dropout": Key("adapter.dropout", number),
    "lora_target": Key("adapter.targets", lambda value: "all-linear" if value == "all" else names(value)),
    "use_rslora": Key("adapter.rank_stabilized", flag),
    "cutoff_len": Key("data.max_length", whole),
    "packing": Key("data.packing", flag),
    "neat_packing": Key("data.packing", flag),
    "train_on_prompt": Key("data.mask_prompt", unlike),
    "num_train_epochs": Key("train.epochs", number),
    "max_steps": Key("train.steps", whole),
    "learning_rate": Key("train.learning_rate", number),
    "lr_scheduler_type": Key("train.schedule", one_of(SCHEDULES)),
    "warmup_steps": Key("train.warmup_steps", whole),
    "optim": Key("train.optimizer", one_of(OPTIMIZERS)),
    "weight_decay": Key("train.weight_decay", number),
    "max_grad_norm": Key("train.max_grad_norm", number),
    "seed": Key("train.seed", whole),
    "save_steps": Key("train.save_every", whole),
    "eval_steps": Key("train.eval_every", whole),
    "logging_steps": Key("train.log_every", whole),
    "save_total_limit": Key("train.keep_checkpoints", lambda value: max(2, whole(value))),
    "report_to": Key("train.trackers", lambda value: [each for each in names(value) if each != "none"]),
    "gradient_checkpointing": Key("memory.checkpointing", lambda value: "on" if flag(value) else "off"),
    "output_dir": Key("output"),
}
REASONS = {
    "stage": "supervised fine-tuning is what is done here",
    "do_train": "`qd2mora train` does",
    "template": "the tokenizer's own template words a chat; instructions are worded as Alpaca does",
    "val_size": "a share; give rows to each task (data.tasks.0.validation=200)",
    "warmup_ratio": "a share; give steps (train.warmup_steps)",
    "overwrite_output_dir": "`qd2mora train RECIPE --overwrite`",
    "flash_attn": "attention is chosen by the base",
    "preprocessing_num_workers": "rows are read as they come",
    "deepspeed": "memory.engine: deepspeed",
}
# LLaMA-Factory's own where they are left out.
DEFAULTS = {
    **{"lora_rank": 8, "lora_target": "all", "cutoff_len": 2048, "num_train_epochs": 3.0, "learning_rate": 5e-5},
    **{"per_device_train_batch_size": 8, "quantization_bit": "none"},
}
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
_FOLDER, _LIST = "data", "dataset_info.json"
LONGEST_LIST = 16 << 20
"""Bytes of a list of data sets that is read."""


def _sources(given: Mapping[str, Value], folder: Path) -> Sources:
    found = Sources(used={"dataset", "dataset_dir", "max_samples"})
    place = folder / str(given.get("dataset_dir") or _FOLDER)
    listed = _listed(place / _LIST)
    if listed is None:
        found.left.append(f"dataset_dir: no {place / _LIST}; paths, formats and fields of the tasks are guessed")
    try:
        asked = names(given.get("dataset") or [])
    except NoCounterpart as error:
        found.left.append(f"dataset: {given['dataset']} ({error})")
        asked = []
    for name in asked:
        entry = (listed or {}).get(name, {"file_name": f"{name}.json"} if listed is None else None)
        try:
            task = {"name": task_name(name, found.tasks), **_task(entry, place, found, name)}
        except NoCounterpart as error:
            found.left.append(f"dataset: {name} ({error})")
            continue
        if given.get("max_samples") is not None:
            task["limit"] = given["max_samples"]
        found.tasks.append(task)
    return found


def _listed(path: Path) -> dict[str, Value] | None:
    try:
        if not path.is_file() or path.stat().st_size > LONGEST_LIST:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _task(entry: Value, place: Path, found: Sources, name: str) -> dict[str, Value]:
    if not isinstance(entry, dict):
        raise NoCounterpart(f"{place / _LIST} lists none of that name")
    if isinstance(entry.get("hf_hub_url"), str):
        path = f"hub:{entry['hf_hub_url']}:{entry.get('split', 'train')}"
    elif isinstance(entry.get("file_name"), str):
        path = str(place / entry["file_name"])
    else:
        raise NoCounterpart("neither a file nor a hub data set")
    rest = entry.keys() - {"hf_hub_url", "ms_hub_url", "file_name", "split", "formatting", "columns", "tags"}
    found.left += [f"{_LIST}, {name}, {key}: {entry[key]} (nothing here is called so)" for key in sorted(rest)]
    columns, tags = (entry[part] if isinstance(entry.get(part), dict) else {} for part in ("columns", "tags"))
    if entry.get("formatting", "alpaca") == "sharegpt":
        fields = {
            "messages": columns.get("messages", "conversations"),
            "role": tags.get("role_tag", "from"),
            "content": tags.get("content_tag", "value"),
            **{name: columns[name] for name in ("tools", "system") if columns.get(name)},
        }
        return {"path": path, "format": "chat", "fields": fields}
    fields = {ours: columns[theirs] for theirs, ours in COLUMNS.items() if columns.get(theirs, ours) != ours}
    left = [f"{_LIST}, {name}, column {each} (instruction rows have none)" for each in columns if each not in COLUMNS]
    found.left += left
    return {"path": path, "format": "instruction", **({"fields": fields} if fields else {})}


LLAMA_FACTORY = Neighbour(
    KEYS, REASONS, DEFAULTS, ("per_device_train_batch_size", "gradient_accumulation_steps"), _sources
)

__all__ = ["LLAMA_FACTORY"]
