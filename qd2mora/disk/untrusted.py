"""Files that others wrote, checked before a library reads them: a model's folder may come from anywhere.

Weights are safetensors or nothing. What a config names is a plain file beside it, never code, never another place.
"""

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from qd2mora.disk.adapter_config import check_adapter_config
from qd2mora.disk.file_content import CONVERT, JsonObject, json_object, refuse_by_magic
from qd2mora.disk.model_config import check_model_config, check_tokenizer_parts, check_tokens
from qd2mora.disk.shards import INDEX, WHOLE
from qd2mora.disk.tensor_file import check_finite, check_safetensors
from qd2mora.errors import DamagedFile, InputRefused
from qd2mora.redact import secret_in

MAX_CONFIG = 4 << 20
MAX_TOKENIZER = 128 << 20

_CONFIGS = ("config.json", "generation_config.json")
_TOKENIZER_CONFIGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.json",
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja")
TOKENIZER_NAMES = (*_TOKENIZER_CONFIGS, *_TOKENIZER_FILES, "additional_chat_templates")
"""What a tokenizer is saved as."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".nemo")

# Keys that make a library import or fetch code.
_CODE_KEYS = {
    *("auto_map", "auto_mapping", "custom_pipelines", "custom_generate", "trust_remote_code", "kernel_config"),
    *("_target_", "_component_", "_partial_", "_args_", "__class__", "__reduce__", "py/object"),
}
_NAMING_KEY = re.compile(r"(_files?|^transformers_weights)$")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")


def check_config(folder: Path, code: Mapping[str, str] | None = None) -> None:
    """Check the configuration of a model's folder; `code`: an auto_map that is known, whose code is not run.

    Raises InputRefused, DamagedFile.
    """
    if (folder / "adapter_config.json").exists():
        raise InputRefused(f"'{folder}' holds an adapter (adapter_config.json), not a base; name the base's own folder")
    for name in _CONFIGS:
        if is_there(folder, name):
            check_model_config(_checked_json(folder / name, code), folder / name)


def check_weights(folder: Path) -> list[Path]:
    """Check every weight file that a model's folder would be loaded from; return them.

    Raises InputRefused, DamagedFile.
    """
    # A base's fingerprint is taken of all of them: one that leads elsewhere is refused though no index names it.
    for path in folder.glob("*.safetensors"):
        is_there(folder, path.name)
    names = [WHOLE] if is_there(folder, WHOLE) else _files_of_index(folder)
    files = [folder / name for name in names]
    for path in files:
        check_safetensors(path)
    return files


def check_tokenizer(folder: Path) -> None:
    """Check the files a tokenizer is loaded from. Raises InputRefused, DamagedFile."""
    for name in _TOKENIZER_CONFIGS:
        if is_there(folder, name):
            check_tokens(_checked_json(folder / name), folder / name)
    templates = [f"additional_chat_templates/{path.name}" for path in folder.glob("additional_chat_templates/*")]
    for name in (*_TOKENIZER_FILES, *templates):
        if is_there(folder, name):
            _check_size_and_magic(folder / name)
    if is_there(folder, "tokenizer.json"):
        path = folder / "tokenizer.json"
        check_tokenizer_parts(json_object(path.read_bytes(), path), path)


def check_adapter(folder: Path) -> None:
    """Check an adapter: one of ours, or a LoRA of PEFT's. Raises InputRefused, DamagedFile."""
    config, content = folder / "adapter_config.json", adapter_settings(folder)
    patterns = [key for key in ("target_modules", "exclude_modules") if isinstance(content.get(key), str)]
    if patterns:  # PEFT takes a text as a regular expression, which may never end
        raise InputRefused(f"{config}: {patterns[0]} is a pattern; a list of names is needed")
    weights = folder / "adapter_model.safetensors"
    check_adapter_config(content, config, weights)
    check_finite(weights)


def adapter_settings(folder: Path) -> JsonObject:
    """Return an adapter's configuration, of which its kind alone was looked at. Raises InputRefused, DamagedFile."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not is_there(folder, name):
            raise InputRefused(f"'{folder}' holds no {name}")
    config = folder / "adapter_config.json"
    content = _checked_json(config)
    if content.get("peft_type") not in ("QD2MORA", "LORA"):
        raise InputRefused(f"{config}: peft_type is {str(content.get('peft_type'))[:80]!r}, not 'QD2MORA' or 'LORA'")
    return content


def is_there(folder: Path, name: str) -> bool:
    """Tell whether a file stands in a folder. Raises InputRefused where it is no ordinary file of that folder."""
    path = folder / name
    if not os.path.lexists(path):
        return False
    home = folder.resolve()
    # The hub's cache keeps the content of snapshots/REVISION in blobs, two folders up.
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(each) for each in homes):
        raise InputRefused(f"{path} is a link to {real}, outside its folder; copy the file there")
    if not os.path.exists(real) or not stat.S_ISREG(real.stat().st_mode):
        raise InputRefused(f"{path} is not an ordinary file")
    return True


def _checked_json(path: Path, code: Mapping[str, str] | None = None) -> JsonObject:
    """Read a small JSON file and refuse what would import, fetch or open something else. Raises InputRefused."""
    _check_size_and_magic(path, MAX_CONFIG)
    content = path.read_bytes()
    parsed = json_object(content, path)
    kind = secret_in(content.decode(errors="replace"))
    if kind:
        raise InputRefused(f"{path} holds {kind}; take it out before it is copied into a run")
    is_known = code is not None and parsed.get("auto_map") == code
    _refuse_code({key: value for key, value in parsed.items() if not (is_known and key == "auto_map")}, path)
    return parsed


def _refuse_code(node: object, path: Path) -> None:
    if isinstance(node, list):
        for child in node:
            _refuse_code(child, path)
    elif isinstance(node, dict):
        for key, value in node.items():
            _refuse_key(key, value, path)
            _refuse_code(value, path)


def _refuse_key(key: str, value: object, path: Path) -> None:
    if key in _CODE_KEYS and value:
        raise InputRefused(f"{path}: {key} asks for code of its own, which is never run; use a base without it")
    named = value if isinstance(value, list) else [value]
    if _NAMING_KEY.search(key) and not all(map(_is_plain, named)):
        raise InputRefused(f"{path}: {key} names {str(value)[:80]!r}; only plain names of files beside it are read")
    if "implementation" in key and any(mark in str(value) for mark in "/:@"):
        raise InputRefused(f"{path}: {key} asks for a kernel from elsewhere, {str(value)[:80]!r}; none is fetched")
    if key == "quantization_config" and value and not (isinstance(value, dict) and value.get("quant_method")):
        raise InputRefused(f"{path}: {key} is {str(value)[:80]!r}, of no method; name the 16-bit model")
    if key == "quant_method" and value != "bitsandbytes":
        raise InputRefused(f"{path}: weights in {str(value)[:80]!r}; name the 16-bit model, or one in bitsandbytes")


def _is_plain(name: object) -> bool:
    return name is None or (isinstance(name, str) and _PLAIN_NAME.fullmatch(name) is not None)


def _files_of_index(folder: Path) -> list[str]:
    """Return the weight files of a sharded model. Raises InputRefused where there are none that may be read."""
    if not is_there(folder, INDEX):
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        if pickled:
            hint = f"{pickled[0]} may run code when it is loaded; {CONVERT}"
            raise InputRefused(f"'{folder}' holds no weights in safetensors: {hint}")
        raise InputRefused(f"'{folder}' holds no weights in safetensors")
    names = _checked_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise DamagedFile(f"{folder / INDEX} has no weight_map")
    for name in names.values():
        if name is None or not _is_plain(name) or not name.endswith(".safetensors"):
            raise InputRefused(f"{folder / INDEX} names {str(name)[:80]!r}; only safetensors files beside it are read")
    files = sorted(set(names.values()))
    missing = [name for name in files if not is_there(folder, name)]
    if missing:
        raise InputRefused(f"'{folder}' is not whole: no {missing[0]}")
    return files


def _check_size_and_magic(path: Path, limit: int = MAX_TOKENIZER) -> None:
    size = path.stat().st_size
    if size > limit:
        raise InputRefused(f"{path}: {size} bytes are too many (limit {limit})")
    with path.open("rb") as file:
        refuse_by_magic(path, file.read(16))


__all__ = ["TOKENIZER_NAMES", "check_adapter", "check_config", "check_tokenizer", "check_weights", "is_there"]
