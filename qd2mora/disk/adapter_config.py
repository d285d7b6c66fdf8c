"""An adapter's configuration that others wrote: every field has a kind and a reach, and sizes are those of its tensors.

Libraries build before they compare: a rank of a billion is memory, a key that is a pattern may be matched for ever, and
a start of its own changes the base. So what a field may be is said here, and what builds something else is refused.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from qd2mora.disk.file_content import JsonObject
from qd2mora.disk.tensor_file import StoredTensor, stored_tensors
from qd2mora.errors import InputRefused

# Twice the linears of the deepest model that is read: 7 in each of 256 layers.
MOST_NAMES = 4096
MOST_PATTERNS = 1024
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,299}")
# PEFT compiles the keys of its patterns: plain names, with dots escaped and anchors, cannot be matched for ever.
_PATTERN = re.compile(r"\^?[A-Za-z0-9_][A-Za-z0-9_.\\-]{0,299}\$?")
_SIZES = ("r", "rank", "attention_rank", "num_tasks", "task_embedding", "external_width")
_BUILDS_MORE = (
    *("megatron_config", "layer_replication", "arrow_config", "corda_config", "lora_ga_config", "velora_config"),
    *("monteclora_config", "kasa_config", "use_bdlora", "use_qalora", "alora_invocation_tokens", "runtime_config"),
)
"""Of PEFT: each makes other layers, other inputs, or a distributed program of the plain update."""


def check_adapter_config(content: JsonObject, path: Path, weights: Path) -> None:
    """Check what an adapter's configuration asks for, against its own tensors too. Raises InputRefused, DamagedFile."""
    for key in _BUILDS_MORE:
        if content.get(key):
            raise InputRefused(f"{path}: {key} is {str(content[key])[:80]!r}; adapters that need it are not loaded")
    for key, (is_fine, wanted) in (_COMMON | (_LORA if content["peft_type"] == "LORA" else _MIXTURE)).items():
        if key in content and content[key] is not None and not is_fine(content[key]):
            raise InputRefused(f"{path}: {key} is {str(content[key])[:80]!r}; {wanted}")
    _check_sizes(content, path, stored_tensors([weights]))


def _check_sizes(content: JsonObject, path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse sizes that no tensor has: they are made before they are compared."""
    # Ranks, experts and tasks are sizes of some tensor, alone or multiplied: what is larger than all of them is made
    # up.
    there = max((size for tensor in tensors.values() for size in _ranks_of(tensor)), default=0)
    for key, size in _sizes_of(content):
        if size > there:
            raise InputRefused(f"{path}: {key} is {size}, and no tensor beside it has more than {there} of them")


def _ranks_of(tensor: StoredTensor) -> list[int]:
    """Return what a tensor shows of ranks, experts, tasks and widths, alone and multiplied."""
    if not tensor.name.endswith(("lora_A.weight", "lora_B.weight")) and "mixture_" not in tensor.name:
        return [min(tensor.shape, default=0)]
    if tensor.name.endswith("lora_B.weight"):
        return [tensor.shape[-1]] if tensor.shape else []
    return [math.prod(tensor.shape[:-1]), *tensor.shape]


def _sizes_of(content: JsonObject) -> list[tuple[str, int | float]]:
    """Return the sizes that a checked configuration asks for."""
    found = [(key, content.get(key)) for key in _SIZES]
    several = [(key, _values(content.get(key))) for key in ("rank_pattern", "down", "up", "core")]
    for key, sizes in several:
        found += [(key, size) for size in sizes]
    if isinstance(ranks := content.get("ranks"), list):
        # Experts of several ranks stand in one tensor, one after another.
        found.append(("the sum of ranks", sum(rank for rank in ranks if isinstance(rank, int))))
    if isinstance(shared := content.get("shared"), dict):
        found.append(("shared.rank", shared.get("rank")))
    # A router that is a network has a hidden layer of its own width.
    gates = content.get("gates")
    for role, gate in gates.items() if isinstance(gates, dict) else ():
        found.append((f"gates.{str(role)[:40]}.width", gate.get("width") if isinstance(gate, dict) else None))
    if isinstance(allocation := content.get("allocation"), str):
        found += [("allocation", int(part)) for part in allocation.split("-")]
    return [(key, size) for key, size in found if isinstance(size, int | float)]


def _values(mapping: object) -> list[object]:
    return list(mapping.values()) if isinstance(mapping, dict) else []


def _is_rank(value: object) -> bool:
    return _is_count(value) or (value == 0 and type(value) is int)  # 0: an expert that is the base (FlexMoRE)


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value <= 1 << 20


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e30  # NaN is not


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 4096


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and len(value) <= MOST_NAMES and all(map(_is_name, value))


def _is_name(value: object) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _are_layers(value: object) -> bool:
    layers = value if isinstance(value, list) else [value]
    return len(layers) <= MOST_NAMES and all(type(layer) is int and 0 <= layer < MOST_NAMES for layer in layers)


def _by_pattern(is_fine: Callable[[object], bool]) -> Callable[[object], bool]:
    def check(value: object) -> bool:
        if not isinstance(value, dict) or len(value) > MOST_PATTERNS:
            return False
        return all(_PATTERN.fullmatch(key) is not None and is_fine(each) for key, each in value.items())

    return check


def _are_tokens(value: object) -> bool:
    lists = list(value.values()) if isinstance(value, dict) else [value]
    return all(
        isinstance(each, list) and len(each) <= 1 << 16 and all(type(one) is int and 0 <= one < 1 << 31 for one in each)
        for each in lists
    )


def _is_plain_content(value: object, depth: int = 0) -> bool:
    """Whether a mapping holds few and small values: words, counts and numbers."""
    if isinstance(value, dict | list):
        parts = list(value.values()) if isinstance(value, dict) else value
        return depth < 4 and len(parts) <= MOST_PATTERNS and all(_is_plain_content(each, depth + 1) for each in parts)
    return value is None or isinstance(value, bool) or _is_text(value) or _is_number(value)


_Rule = tuple[Callable[[object], bool], str]
_FLAG: _Rule = (_is_flag, "true or false is needed")
_TEXT: _Rule = (_is_text, "a short text is needed")
_NAMES: _Rule = (_are_names, f"a list of at most {MOST_NAMES} plain names is needed")
_COUNT: _Rule = (_is_count, "a whole number from 1 to 1048576 is needed")
_NUMBER: _Rule = (_is_number, "a number of at most 1e30 is needed")
_CONTENT: _Rule = (lambda value: isinstance(value, dict) and _is_plain_content(value), "a small mapping is needed")
_FRACTION: _Rule = (lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to below 1 is needed")  # type: ignore[operator]

_COMMON: dict[str, _Rule] = {
    "task_type": (lambda value: value == "CAUSAL_LM", "'CAUSAL_LM' is needed"),
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "peft_version": _TEXT,
    "inference_mode": _FLAG,
    "target_modules": (lambda value: _are_names(value) and bool(value), "a list of plain names is needed"),
    "exclude_modules": _NAMES,
    "modules_to_save": (lambda value: _are_names(value) and len(value) <= 64, "a list of at most 64 names is needed"),  # type: ignore[arg-type]
    "layers_to_transform": (_are_layers, "numbers of layers are needed"),
    "layers_pattern": (lambda value: _is_name(value) or _are_names(value), "plain names are needed"),
}
_LORA: dict[str, _Rule] = {
    "r": _COUNT,
    "lora_alpha": _NUMBER,
    "lora_dropout": _FRACTION,
    "fan_in_fan_out": _FLAG,
    "bias": (lambda value: value in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only' is needed"),
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "lora_bias": _FLAG,
    "ensure_weight_tying": _FLAG,
    "init_lora_weights": (
        lambda value: isinstance(value, bool) or value in ("gaussian", "eva", "orthogonal"),
        "such a start changes the base too; save the adapter converted to a plain LoRA",
    ),
    "rank_pattern": (_by_pattern(_is_count), f"at most {MOST_PATTERNS} plain names with ranks are needed"),
    "alpha_pattern": (_by_pattern(_is_number), f"at most {MOST_PATTERNS} plain names with numbers are needed"),
    "megatron_core": (lambda value: value == "megatron.core", "no other module is imported"),
    "trainable_token_indices": (_are_tokens, "a list of token numbers is needed"),
    "target_parameters": _NAMES,
    "loftq_config": _CONTENT,
    "eva_config": _CONTENT,
    "qalora_group_size": _COUNT,
}
_MIXTURE: dict[str, _Rule] = {
    "method": (_is_name, "a plain name is needed"),
    "rank": _COUNT,
    "ranks": (
        lambda value: isinstance(value, list) and len(value) <= MOST_NAMES and all(map(_is_rank, value)),
        f"at most {MOST_NAMES} ranks are needed",
    ),
    "alpha": _NUMBER,
    "rank_stabilized": _FLAG,
    "dropout": _FRACTION,
    "dropout_per_expert": _FLAG,
    "train_experts": _FLAG,
    **dict.fromkeys(("down", "up", "core", "shared", "gates", "penalties"), _CONTENT),
    "allocation": (
        lambda value: isinstance(value, str) and re.fullmatch(r"\d{1,4}(-\d{1,4}){0,255}", value) is not None,
        "experts by depth are needed, such as 2-4-6-8",
    ),
    "init": (_is_name, "a plain name is needed"),
    "experts": (lambda value: value == "dora", "dora alone is known"),
    **dict.fromkeys(("num_tasks", "task_embedding", "external_width", "attention_rank"), _COUNT),
}

__all__ = ["check_adapter_config"]
