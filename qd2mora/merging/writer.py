"""A plain Hugging Face folder, written weight by weight from the base's files.

Each weight is read (dequantised where training quantised it), the update added in float32 and rounded once, a block of
rows at a time, straight into the file: the peak is one weight in float32 and what dequantising it takes, for any size.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qd2mora.disk.durable import save_pretrained
from qd2mora.errors import InputRefused, NotFinite
from qd2mora.merging.folds import Fold
from qd2mora.merging.shards import Entry, File, write_shards
from qd2mora.merging.source import Source

SHARD_BYTES = 5 * 10**9
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
OUTPUT = "lm_head.weight"
INPUT = "model.embed_tokens.weight"


@dataclass
class Written:
    """What a writer did: its files, and the rounding of each changed weight relative to its update."""

    files: list[File] = field(default_factory=list)
    rounding: dict[str, float] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


def write_model(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    folds: Mapping[str, Fold],
    folder: Path,
    *,
    dtype: str = "float16",
    limit: int = SHARD_BYTES,
) -> Written:
    """Write the base's weights into an existing folder, each linear of `folds` folded, in files of at most `limit`.

    Raises NotFinite where a weight does not fit the dtype, InputRefused where the base lacks what is to be changed.
    """
    written = Written()
    written.files = write_shards(folder, entries_of(source, folds, DTYPES[dtype], written), limit)
    # An output matrix with an update of its own is no longer the embedding.
    write_config(source, folder, dtype, tied=None if f"{OUTPUT}" not in _changed(folds) else False)
    save_pretrained(tokenizer, folder)
    return written


def entries_of(
    source: Source,
    folds: Mapping[str, Fold],
    dtype: torch.dtype,
    written: Written,
    read_back: Callable[[Tensor], Tensor] | None = None,
) -> list[Entry]:
    """Return every weight of the base as an entry, those of `folds` changed, with rounding noted in `written`.

    `read_back`: what is read of a block again, where the file holds it more narrowly than in the dtype.
    """
    changed, names = _changed(folds), list(source.names)
    if OUTPUT in changed and OUTPUT not in names:
        names.append(OUTPUT)
    unknown = sorted(set(changed) - set(names))
    if unknown:
        raise InputRefused(f"the base has no weight {unknown[0]}, which the adapter changes")

    def one(name: str) -> Entry:
        stored = name if name in source.names else INPUT
        return Entry(
            name,
            dtype,
            source.shape(stored),
            lambda: _rounded_blocks(source, name, stored, changed.get(name), dtype, written, read_back),
        )

    return [one(name) for name in names]


def _rounded_blocks(
    source: Source,
    name: str,
    stored: str,
    fold: Fold | None,
    dtype: torch.dtype,
    written: Written,
    read_back: Callable[[Tensor], Tensor] | None,
) -> Iterator[Tensor]:
    """Yield blocks of one weight in the dtype. Raises NotFinite."""
    error, size = 0.0, 0.0
    for start, rows in source.blocks(stored):
        exact = rows if fold is None else fold(rows, start)
        narrow = exact.to(dtype)
        if not torch.isfinite(narrow).all():
            raise NotFinite(
                f"{name}: a weight of {float(exact.abs().max()):g} does not fit {_word(dtype)}{_hint(dtype)}"
            )
        if fold is not None:
            read = narrow if read_back is None else read_back(narrow)
            error += float((read.float() - exact).square().sum())
            size += float((exact - rows).square().sum())
        yield narrow
    if fold is not None:
        written.rounding[name.removesuffix(".weight")] = math.sqrt(error / size) if size else 0.0


def write_config(source: Source, folder: Path, dtype: str, *, tied: bool | None = None) -> None:
    """Write config.json, and generation_config.json where the base has one."""
    content = config_of(source, dtype)
    if tied is not None:
        content["tie_word_embeddings"] = tied
    (folder / "config.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    settings = source.folder / "generation_config.json"
    if settings.is_file():
        (folder / settings.name).write_bytes(settings.read_bytes())


def config_of(source: Source, dtype: str) -> dict[str, object]:
    """Return the base's configuration for plain weights of the dtype."""
    content: dict[str, object] = source.config.to_dict()
    for key in ("quantization_config", "_pre_quantization_dtype", "_name_or_path", "torch_dtype"):
        content.pop(key, None)
    return content | {"dtype": dtype, "architectures": [source.architecture]}


def _changed(folds: Mapping[str, Fold]) -> dict[str, Fold]:
    return {f"{name}.weight": fold for name, fold in folds.items()}


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _hint(dtype: torch.dtype) -> str:
    return "; --dtype bfloat16 (in a GGUF file q8_0) holds it, with more rounding" if dtype is torch.float16 else ""


__all__ = [
    "DTYPES",
    "SHARD_BYTES",
    "Written",
    "config_of",
    "entries_of",
    "write_config",
    "write_model",
]
