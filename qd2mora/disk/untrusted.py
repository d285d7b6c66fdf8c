"""Files that others wrote, checked before a library reads them: a model's folder may come from anywhere.

Weights are safetensors or nothing. What a config names is a plain file beside it, never code, never another place.
"""

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qd2mora.errors import DamagedFile, InputRefused
from qd2mora.redact import secret_in

MAX_HEADER = 2 << 20
MAX_CONFIG = 4 << 20
MAX_TOKENIZER = 128 << 20

INDEX = "model.safetensors.index.json"
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
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".nemo")
_CONVERT = "convert it once, where it may be trusted, with save_pretrained(..., safe_serialization=True)"

_BITS = dict.fromkeys(("F64", "I64", "U64", "C64"), 64) | dict.fromkeys(("F32", "I32", "U32"), 32)
_BITS |= dict.fromkeys(("F16", "BF16", "I16", "U16"), 16)
_BITS |= dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8)
_MAGIC = {
    b"PK": "a zip archive, as torch.save writes it, with a pickle inside",
    b"\x80": "a Python pickle",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x1f\x8b": "a gzip file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"Rar!": "a rar archive",
    b"GGUF": "a GGUF file",
    b"\x89PNG": "a picture",
    b"\x93NUMPY": "a numpy file",
    b"\x89HDF": "an HDF5 file",
    b"\x7fELF": "a program",
    b"#!": "a program",
}

# Keys that make a library import or fetch code.
_CODE_KEYS = {"auto_map", "auto_mapping", "custom_pipelines", "custom_generate", "trust_remote_code"}
_CODE_KEYS |= {
    "_target_",
    "_component_",
    "_partial_",
    "_args_",
    "__class__",
    "__reduce__",
    "py/object",
    "kernel_config",
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
            _check_mapping(folder / name, code)


def check_weights(folder: Path) -> list[Path]:
    """Check every weight file that a model's folder would be loaded from; return them.

    Raises InputRefused, DamagedFile.
    """
    for path in folder.glob("*.safetensors"):
        is_there(folder, path.name)
    names = ["model.safetensors"]
    if not is_there(folder, names[0]):
        names = _indexed(folder)
    files = [folder / name for name in names]
    for path in files:
        check_safetensors(path)
    return files


def check_tokenizer(folder: Path) -> None:
    """Check the files a tokenizer is loaded from. Raises InputRefused, DamagedFile."""
    for name in _TOKENIZER_CONFIGS:
        if is_there(folder, name):
            _check_mapping(folder / name)
    templates = [f"additional_chat_templates/{path.name}" for path in folder.glob("additional_chat_templates/*")]
    for name in (*_TOKENIZER_FILES, *templates):
        if is_there(folder, name):
            _check_start(folder / name)


def check_adapter(folder: Path) -> None:
    """Check an adapter: one of ours, or a LoRA of PEFT's. Raises InputRefused, DamagedFile."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not is_there(folder, name):
            raise InputRefused(f"'{folder}' holds no {name}")
    config = folder / "adapter_config.json"
    content = _check_mapping(config)
    if content.get("peft_type") not in ("QD2MORA", "LORA"):
        raise InputRefused(f"{config}: peft_type is {str(content.get('peft_type'))[:80]!r}, not 'QD2MORA' or 'LORA'")
    patterns = [key for key in ("target_modules", "exclude_modules") if isinstance(content.get(key), str)]
    if patterns:  # PEFT takes a text as a regular expression, which may never end
        raise InputRefused(f"{config}: {patterns[0]} is a pattern; a list of names is needed")
    check_safetensors(folder / "adapter_model.safetensors")


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


def check_safetensors(path: Path) -> None:
    """Check a safetensors file's header against its size, without reading its data.

    Raises InputRefused where it is something else by its content, DamagedFile where it is not whole.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        if len(start) < 9 or start[8:] != b"{" or length > MAX_HEADER:
            _refuse_by_magic(path, start)
            raise DamagedFile(f"{path} is no safetensors file: its header says {length} bytes (limit {MAX_HEADER})")
        if 8 + length > size:
            raise DamagedFile(f"{path} is cut short: a header of {length} bytes in a file of {size}")
        file.seek(8)
        header = _parsed(file.read(length), path)
    spans = sorted(_span(name, entry, path) for name, entry in header.items() if name != "__metadata__")
    place = 0
    for begin, end in spans:
        if begin != place:
            raise DamagedFile(f"{path}: tensors overlap or leave a gap at byte {min(begin, place)} of the data")
        place = end
    if place != size - 8 - length:
        raise DamagedFile(f"{path}: {place} bytes of tensors in {size - 8 - length} bytes of data")


def _span(name: str, entry: Any, path: Path) -> tuple[int, int]:
    shape: Any
    offsets: Any
    fields = entry if isinstance(entry, dict) else {}
    shape, offsets, dtype = fields.get("shape"), fields.get("data_offsets"), fields.get("dtype")
    whole = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 and len(shape) <= 16
    if not whole or not all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, *offsets)):
        raise DamagedFile(f"{path}: tensor {name[:80]!r} has no whole shape and place")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise DamagedFile(f"{path}: tensor {name[:80]!r} is of an unknown kind")
    if math.prod(shape) * _BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise DamagedFile(f"{path}: tensor {name[:80]!r} does not fill its place")
    return offsets[0], offsets[1]


def _parsed(content: bytes, path: Path) -> dict[str, Any]:
    def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise DamagedFile(f"{path}: a key is given twice")
        return dict(pairs)

    try:
        parsed = json.loads(content, object_pairs_hook=without_twins)
    except (ValueError, RecursionError) as error:
        what = "is nested too deeply" if isinstance(error, RecursionError) else f"is not JSON: {error}"
        raise DamagedFile(f"{path} {what}") from error
    if not isinstance(parsed, dict):
        raise DamagedFile(f"{path} is no JSON object")
    return parsed


def _check_mapping(path: Path, code: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Read a small JSON file and refuse what would import, fetch or open something else. Raises InputRefused."""
    _check_start(path, MAX_CONFIG)
    content = path.read_bytes()
    parsed = _parsed(content, path)
    kind = secret_in(content.decode(errors="replace"))
    if kind:
        raise InputRefused(f"{path} holds {kind}; take it out before it is copied into a run")
    is_known = code is not None and parsed.get("auto_map") == code
    _refuse_code({key: value for key, value in parsed.items() if not (is_known and key == "auto_map")}, path)
    return parsed


def _refuse_code(node: Any, path: Path) -> None:
    for child in node if isinstance(node, list) else ():
        _refuse_code(child, path)
    for key, value in node.items() if isinstance(node, dict) else ():
        if key in _CODE_KEYS and value:
            raise InputRefused(f"{path}: {key} asks for code of its own, which is never run; use a base without it")
        if _NAMING_KEY.search(key) and not all(map(_is_plain, value if isinstance(value, list) else [value])):
            raise InputRefused(f"{path}: {key} names {str(value)[:80]!r}; only plain names of files beside it are read")
        if "implementation" in key and any(mark in str(value) for mark in "/:@"):
            raise InputRefused(f"{path}: {key} asks for a kernel from elsewhere, {str(value)[:80]!r}; none is fetched")
        if key == "quant_method" and value != "bitsandbytes":
            raise InputRefused(f"{path}: weights in {str(value)[:80]!r}; name the 16-bit model, or one in bitsandbytes")
        _refuse_code(value, path)


def _is_plain(name: Any) -> bool:
    return name is None or (isinstance(name, str) and _PLAIN_NAME.fullmatch(name) is not None)


def _indexed(folder: Path) -> list[str]:
    """Return the weight files of a sharded model. Raises InputRefused where there are none that may be read."""
    if not is_there(folder, INDEX):
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        hint = f": {pickled[0]} may run code when it is loaded; {_CONVERT}" if pickled else ""
        raise InputRefused(f"'{folder}' holds no weights in safetensors{hint}")
    names = _check_mapping(folder / INDEX).get("weight_map")
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


def _check_start(path: Path, limit: int = MAX_TOKENIZER) -> None:
    size = path.stat().st_size
    if size > limit:
        raise InputRefused(f"{path}: {size} bytes are too many (limit {limit})")
    with path.open("rb") as file:
        _refuse_by_magic(path, file.read(16))


def _refuse_by_magic(path: Path, start: bytes) -> None:
    for magic, kind in _MAGIC.items():
        if start.startswith(magic):
            raise InputRefused(f"{path} is {kind}, whatever its name says; {_CONVERT}")


__all__ = ["check_adapter", "check_config", "check_safetensors", "check_tokenizer", "check_weights", "is_there"]
