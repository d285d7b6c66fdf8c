"""A model's files: the folder they lie in, fetched from the hub where they are not here, and a hash of them."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError

from qd2mora.disk.file_hash import hash_of_bytes, hash_of_file
from qd2mora.disk.gguf_header import parts_of
from qd2mora.errors import InputRefused
from qd2mora.recipe import Base

RANDOM = "random:"

# What transformers 5 raises on a config or tokenizer file that is not as it should be: it checks little of them itself.
UNLOADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    SafetensorError,
    StrictDataclassError,
)


def fingerprint(base: Base) -> str:
    """Return a hash of a base's configuration and of every byte of its weights, wherever the folder lies.

    A hub id is hashed by what is in the local cache, which loading fills; random weights by the shape's name. Files are
    read side by side at about 1 GB/s each, once in a process, and are in the page cache then.
    """
    paths, folder = weight_files(base.model), local_folder(base.model)
    if folder is not None and not is_gguf(base.model):
        paths = [folder / "config.json", *paths]
    if not paths:
        return hash_of_bytes(base.model.encode())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes = pool.map(_remembered_hash, paths)
        names = [f"{path.name} {content}" for path, content in zip(paths, hashes, strict=True)]
    return hash_of_bytes("".join(names).encode())


def weight_files(model: str) -> list[Path]:
    """Return the files that hold a base's weights on this machine; none where they are not here."""
    if is_gguf(model):  # in parts: all those beside it that are called alike
        return parts_of(Path(model))
    folder = local_folder(model)
    if folder is None:
        return []
    return sorted(folder.glob("*.safetensors"))


def is_gguf(model: str) -> bool:
    """Tell whether a base is a GGUF file, by its name."""
    return model.lower().endswith(".gguf")


def local_folder(model: str) -> Path | None:
    """Return where a model's files lie on this machine; of a GGUF file, the folder that holds it."""
    if is_gguf(model):
        return Path(model).parent if os.path.isfile(model) else None
    if Path(model).is_dir():
        return Path(model)
    if model.startswith(RANDOM):
        return None
    try:
        cached = try_to_load_from_cache(model, "config.json")
    except HFValidationError:  # a path that is not there is no name on the hub
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def folder_of(model: str, patterns: list[str], needs: str = "config.json") -> Path:
    """Return the folder of a model; of a hub id, where its files of these patterns are kept. Raises InputRefused."""
    _refuse_missing(model, needs)
    if os.path.isdir(model):
        return Path(model)
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise InputRefused(
            f"base.model: '{model}' is no folder here and cannot be got from the hub: {first_line(error)}"
        ) from error


def _refuse_missing(model: str, needs: str = "config.json") -> None:
    """A name with more than one slash, or one that starts like a path, is a folder; it must hold what is needed."""
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") != 1
    # os.path: an impossible name (too long, say) is not there, where Path.exists raises.
    if os.path.isdir(model):
        if not (Path(model) / needs).exists():
            raise InputRefused(f"base.model: '{model}' holds no {needs}; name the folder of a Hugging Face model")
    elif os.path.exists(model):
        raise InputRefused(f"base.model: '{model}' is a file; name a Hugging Face model's folder, or a .gguf file")
    elif is_gguf(model):
        raise InputRefused(f"base.model: no file '{model}'")
    elif looks_like_path:
        raise InputRefused(f"base.model: no folder '{model}'; give a model's folder, a hub id or random:SHAPE")


def first_line(error: BaseException) -> str:
    """Return what an error says in one line, and the next where the first only announces it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].endswith(":") and len(lines) > 1:
        return f"{lines[0]} {lines[1].strip()}"
    return lines[0]


def _remembered_hash(path: Path) -> str:
    state = path.stat()
    # Whoever writes a file changes one of these; ctime cannot be set back as mtime can.
    return _hash_in_state(path, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@lru_cache(maxsize=256)
def _hash_in_state(path: Path, *state: int) -> str:
    """Return a file's hash; as long as the file's state is the same, it is read only once."""
    return hash_of_file(path)


__all__ = ["RANDOM", "UNLOADABLE", "fingerprint", "first_line", "folder_of", "is_gguf", "local_folder", "weight_files"]
