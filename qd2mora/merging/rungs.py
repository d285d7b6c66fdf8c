"""The ladder of exports: what each rung writes, in which dtypes, and the manifest that seals it."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qd2mora.disk.durable import save_pretrained
from qd2mora.disk.sealed import MANIFEST, seal_folder
from qd2mora.errors import InputRefused, nearest
from qd2mora.merging import exact, gguf_file, gguf_lora
from qd2mora.merging.folds import folds_of
from qd2mora.merging.lora import write_lora
from qd2mora.merging.shards import shard_bytes
from qd2mora.merging.source import Source
from qd2mora.merging.static import Statics
from qd2mora.merging.writer import DTYPES, SHARD_BYTES, Written, write_model
from qd2mora.recipe import Base
from qd2mora.run_folder import OpenRun

BASES = ("dequantized", "original")


@dataclass(frozen=True)
class Form:
    """What an export is written as: the rung, the base's weights, their dtype, and the size of a file.

    `with_vocabulary`: whether a GGUF file holds a tokenizer, or takes and gives token ids alone.
    """

    to: str = "hf"
    base: str = "dequantized"
    dtype: str = "float16"
    limit: int = SHARD_BYTES
    with_vocabulary: bool = True

    @property
    def is_routed(self) -> bool:
        """Whether the routed adapter itself goes along, so that nothing is made static."""
        return RUNGS[self.to].is_routed

    @property
    def holds_no_base(self) -> bool:
        """Whether the update alone is written."""
        return RUNGS[self.to].holds_no_base


Write = Callable[[Path], Written]
Prepare = Callable[[OpenRun, Source, Statics, Form], Write]
"""Takes from a run what the export needs and nothing more, so that the model may go before the writing."""


@dataclass(frozen=True)
class Rung:
    """One way out; the first of its dtypes is the default."""

    prepare: Prepare
    dtypes: tuple[str, ...]
    is_routed: bool = False
    holds_no_base: bool = False
    has_shards: bool = False


def form_of(
    to: str,
    base: str = "dequantized",
    dtype: str | None = None,
    max_shard: str | None = None,
    with_vocabulary: bool = True,
) -> Form:
    """Return a checked form. Raises InputRefused."""
    if to not in RUNGS:
        raise InputRefused(f"--to: unknown '{to}'; {nearest(to, RUNGS)}")
    if base not in BASES:
        raise InputRefused(f"--base: unknown '{base}'; {nearest(base, BASES)}")
    if base == "original" and RUNGS[to].holds_no_base:
        raise InputRefused("--base: a LoRA holds no base; load it on whichever base is wanted")
    if base == "original" and to == "exact":
        raise InputRefused("--base: --to exact is the model that was trained, which saw the dequantized base")
    dtypes = RUNGS[to].dtypes
    if dtype is not None and dtype not in dtypes:
        raise InputRefused(f"--dtype: '{dtype}' will not do for --to {to}; there are {', '.join(dtypes)}")
    if not with_vocabulary and to != "gguf":
        raise InputRefused(f"--no-vocabulary: --to {to} keeps the tokenizer as it is; it goes with --to gguf")
    if max_shard is not None and not RUNGS[to].has_shards:
        raise InputRefused(f"--max-shard: --to {to} writes one file of weights; it goes with --to hf and --to exact")
    limit = SHARD_BYTES if max_shard is None else shard_bytes(max_shard)
    return Form(to, base, dtype or dtypes[0], limit, with_vocabulary)


def open_source(opened: OpenRun, form: Form) -> Source:
    """Open the base that an export is made from, before the work begins. Raises InputRefused."""
    source = Source(opened.recipe.base, original=form.base == "original", device=opened.model.device)
    if form.is_routed:
        exact.refuse_unfit(opened.model, source)
    if form.to == "gguf":
        gguf_file.refuse_unfit(source, opened.tokenizer, with_vocabulary=form.with_vocabulary)
    if form.to == "gguf_lora":
        gguf_lora.refuse_unfit(source)
    return source


def prepare_rung(opened: OpenRun, source: Source, statics: Statics, form: Form) -> Write:
    """Return what writes an export into an existing folder; it does not hold the model. Raises InputRefused."""
    return RUNGS[form.to].prepare(opened, source, statics, form)


def seal(folder: Path, written: Written, base: Base) -> None:
    """Write the manifest: the base trained on, and each file's size and hash, as they were meant to be written."""
    known = {file.name: (file.num_bytes, file.sha256) for file in written.files}
    for path in sorted(folder.iterdir()):
        if path.name not in known and path.name != MANIFEST:
            with path.open("rb") as file:
                known[path.name] = (path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    seal_folder(folder, known, {"kind": "export", "base": base.model_dump()})


def _hf(opened: OpenRun, source: Source, statics: Statics, form: Form) -> Write:
    folds, tokenizer = folds_of(opened.model, statics), opened.tokenizer
    return lambda folder: write_model(source, tokenizer, folds, folder, dtype=form.dtype, limit=form.limit)


def _exact(opened: OpenRun, source: Source, statics: Statics, form: Form) -> Write:
    routed, tokenizer = exact.routed_parts(opened.model), opened.tokenizer
    return lambda folder: exact.write_exact(routed, source, tokenizer, folder, dtype=form.dtype, limit=form.limit)


def _lora(opened: OpenRun, source: Source, statics: Statics, form: Form) -> Write:
    parts, tokenizer = dict(statics), opened.tokenizer

    def write(folder: Path) -> Written:
        files = write_lora(parts, source.base.model, source.linears, folder, dtype=DTYPES[form.dtype])
        save_pretrained(tokenizer, folder)
        return Written(files)

    return write


def _gguf(opened: OpenRun, source: Source, statics: Statics, form: Form) -> Write:
    folds, tokenizer, name = folds_of(opened.model, statics), opened.tokenizer, opened.folder.path.resolve().name
    how: dict[str, Any] = {"name": name, "dtype": form.dtype, "with_vocabulary": form.with_vocabulary}
    return lambda folder: gguf_file.write_gguf(source, tokenizer, folds, folder, **how)


def _gguf_lora(opened: OpenRun, source: Source, statics: Statics, form: Form) -> Write:
    parts, name, dtype = dict(statics), opened.folder.path.resolve().name, form.dtype
    return lambda folder: Written(gguf_lora.write_gguf_lora(parts, source, folder, name=name, dtype=dtype))


RUNGS = {
    "hf": Rung(_hf, ("float16", "bfloat16", "float32"), has_shards=True),
    "lora": Rung(_lora, ("float32", "float16", "bfloat16"), holds_no_base=True),
    "gguf": Rung(_gguf, ("float16", "q8_0")),
    "gguf_lora": Rung(_gguf_lora, ("float32", "float16"), holds_no_base=True),
    "exact": Rung(_exact, ("float16", "bfloat16", "float32", "nf4"), is_routed=True, has_shards=True),
}

__all__ = ["BASES", "RUNGS", "Form", "Rung", "form_of", "open_source", "prepare_rung", "seal"]
