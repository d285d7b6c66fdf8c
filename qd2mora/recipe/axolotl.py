"""axolotl's keys, as recipes name them."""

from collections.abc import Mapping
from pathlib import Path

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

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
OPTIMIZERS = {
    **dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "adamw_8bit"),
    "paged_adamw_8bit": "paged_adamw_8bit",
}
EIGHT_BIT = "8-bit weights have no place here; 4-bit ones (base.quantization: nf4) are what is used"

KEYS = {
    "base_model": Key("base.model"),
    "load_in_4bit": Key("base.quantization", lambda value: "nf4" if flag(value) else "none"),
    "bf16": Key("base.compute_dtype", one_of({"true": "bfloat16", "full": "bfloat16", "auto": "auto"})),
    "fp16": Key("base.compute_dtype", only_if(True, "float16", "that is so where nothing else is asked for")),
    "adapter": Key("adapter.method", one_of({"lora": "lora", "qlora": "lora"}, "adapters are what is trained here")),
    "lora_r": Key("adapter.rank", whole),
    "lora_alpha": Key("adapter.alpha", number),
    "lora_dropout": Key("adapter.dropout", number),
    "lora_target_modules": Key("adapter.targets", names),
    "lora_target_linear": Key("adapter.targets", only_if(True, "all-linear", "lora_target_modules says which")),
    "peft_use_rslora": Key("adapter.rank_stabilized", flag),
    "sequence_len": Key("data.max_length", whole),
    "sample_packing": Key("data.packing", flag),
    "train_on_inputs": Key("data.mask_prompt", unlike),
    "num_epochs": Key("train.epochs", number),
    "max_steps": Key("train.steps", whole),
    "learning_rate": Key("train.learning_rate", number),
    "lr_scheduler": Key("train.schedule", one_of(SCHEDULES)),
    "warmup_steps": Key("train.warmup_steps", whole),
    "optimizer": Key("train.optimizer", one_of(OPTIMIZERS)),
    "weight_decay": Key("train.weight_decay", number),
    "max_grad_norm": Key("train.max_grad_norm", number),
    "seed": Key("train.seed", whole),
    "save_steps": Key("train.save_every", whole),
    "eval_steps": Key("train.eval_every", whole),
    "logging_steps": Key("train.log_every", whole),
    "save_total_limit": Key("train.keep_checkpoints", lambda value: max(2, whole(value))),
    "early_stopping_patience": Key("train.early_stopping", whole),
    "gradient_checkpointing": Key("memory.checkpointing", lambda value: "on" if flag(value) else "off"),
    "output_dir": Key("output"),
}
REASONS = {
    "load_in_8bit": EIGHT_BIT,
    "val_set_size": "a share; give rows to each task (data.tasks.0.validation=200)",
    "warmup_ratio": "a share; give steps (train.warmup_steps)",
    "flash_attention": "attention is chosen by the base",
    "tf32": "follows from base.compute_dtype",
    "wandb_project": "train.trackers: [wandb], and wandb's own environment variables",
    "deepspeed": "memory.engine: deepspeed",
    "hub_model_id": "nothing is uploaded",
    "resume_from_checkpoint": "`qd2mora train RECIPE --resume`",
}
# axolotl's own where they are left out.
DEFAULTS = {
    "adapter": "none",
    "load_in_4bit": False,
    "lora_alpha": 16,
    "learning_rate": 2e-4,
    "num_epochs": 1,
    "lr_scheduler": "cosine",
}
TYPES: dict[str, dict[str, Value]] = {
    "alpaca": {"format": "instruction"},
    "completion": {"format": "text"},
    "chat_template": {"format": "chat", "fields": {"messages": "messages"}},
    "sharegpt": {"format": "chat", "fields": {"messages": "conversations", "role": "from", "content": "value"}},
}
_FILES = (".json", ".jsonl", ".csv", ".txt", ".parquet", ".arrow")
_READ = {"path", "type", "split", "ds_type", "data_files", "field_messages", "message_property_mappings"}
_READ |= {"message_field_role", "message_field_content", "field", "field_tools", "field_system"}


def _sources(given: Mapping[str, Value], folder: Path) -> Sources:
    found = Sources(used={"datasets"})
    datasets = given.get("datasets") or []
    if not isinstance(datasets, list):
        found.left.append(f"datasets: {datasets} (a list is meant)")
        datasets = []
    for entry in datasets:
        if not isinstance(entry, dict):
            found.left.append(f"datasets: {entry} (an entry is a mapping)")
            continue
        try:
            found.tasks.append(_task(entry, found.tasks))
        except NoCounterpart as error:
            found.left.append(f"datasets: {entry} ({error})")
        found.left += [
            f"datasets, {key}: {entry[key]} (nothing here is called so)" for key in entry if key not in _READ
        ]
    return found


def _task(entry: dict[str, Value], others: list[dict[str, Value]]) -> dict[str, Value]:
    kind = TYPES.get(str(entry.get("type", "")).partition(".")[0])
    if kind is None:
        raise NoCounterpart(f"rows of type '{entry.get('type')}'; there are {', '.join(TYPES)}")
    path = str(entry.get("data_files") or entry.get("path", ""))
    if isinstance(entry.get("data_files"), list):
        raise NoCounterpart("several files; name each as a task of its own")
    if not path.endswith(_FILES):
        path = f"hub:{path}:{entry.get('split', 'train')}"
    task = {"name": task_name(path.removeprefix("hub:").partition(":")[0], others), "path": path, **kind}
    if kind["format"] == "chat":
        task["fields"] = _fields(entry, kind["fields"])
    elif kind["format"] == "text" and entry.get("field"):
        task["fields"] = {"text": entry["field"]}
    return task


def _fields(entry: dict[str, Value], usual: Value) -> dict[str, str]:
    """Return what the file calls a conversation's parts."""
    fields = dict(usual)
    named = entry.get("message_property_mappings")
    own = {
        "messages": entry.get("field_messages"),
        "role": entry.get("message_field_role"),
        "content": entry.get("message_field_content"),
        "tools": entry.get("field_tools"),
        "system": entry.get("field_system"),
        **(named if isinstance(named, dict) else {}),
    }
    known = ("messages", "role", "content", "tools", "system")
    return fields | {key: name for key, name in own.items() if key in known and name}


AXOLOTL = Neighbour(KEYS, REASONS, DEFAULTS, ("micro_batch_size", "gradient_accumulation_steps"), _sources)

__all__ = ["AXOLOTL"]
