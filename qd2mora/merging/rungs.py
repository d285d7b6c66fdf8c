"""The ladder of exports: its rungs by name, and the check of what is asked for."""

from qd2mora.base.passes import device_of
from qd2mora.errors import InputRefused, nearest
from qd2mora.merging import exact, gguf_file, gguf_lora, hf_folder, lora
from qd2mora.merging.base_weights import BaseWeights
from qd2mora.merging.rung import SHARD_BYTES, ExportForm, Rung
from qd2mora.run_folder import OpenRun

RUNGS: dict[str, Rung] = {
    "hf": hf_folder.RUNG,
    "lora": lora.RUNG,
    "gguf": gguf_file.RUNG,
    "gguf_lora": gguf_lora.RUNG,
    "exact": exact.RUNG,
}
BASES = ("dequantized", "original")
_SHORT = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
"""Dtypes as llama.cpp names them."""
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def export_form(
    to: str,
    base: str = "dequantized",
    dtype: str | None = None,
    max_shard: str | None = None,
    with_vocabulary: bool = True,
) -> ExportForm:
    """Return a checked form. Raises InputRefused."""
    if to not in RUNGS:
        raise InputRefused(f"--to: unknown '{to}'; {nearest(to, RUNGS)}")
    if base not in BASES:
        raise InputRefused(f"--base: unknown '{base}'; {nearest(base, BASES)}")
    rung, dtype = RUNGS[to], _SHORT.get(dtype or "", dtype)
    if base == "original" and rung.holds_no_base:
        raise InputRefused("--base: a LoRA holds no base; load it on whichever base is wanted")
    if base == "original" and rung.is_routed:
        raise InputRefused(f"--base: --to {to} is the model that was trained, which saw the dequantized base")
    if dtype is not None and dtype not in rung.dtypes:
        raise InputRefused(f"--dtype: '{dtype}' will not do for --to {to}; there are {', '.join(rung.dtypes)}")
    if not with_vocabulary and not rung.may_lack_vocabulary:
        raise InputRefused(f"--no-vocabulary: --to {to} keeps the tokenizer as it is; it goes with --to gguf")
    limit = SHARD_BYTES
    if max_shard is not None:
        if not rung.has_shards:
            raise InputRefused(
                f"--max-shard: --to {to} writes one file of weights; it goes with --to hf and --to exact"
            )
        limit = shard_bytes(max_shard)
    return ExportForm(to, rung, base, dtype or rung.dtypes[0], limit, with_vocabulary)


def open_weights(opened: OpenRun, form: ExportForm) -> BaseWeights:
    """Open the base that an export is made from, before the work begins. Raises InputRefused where it cannot be."""
    weights = BaseWeights(opened.recipe.base, original=form.base == "original", device=device_of(opened.model))
    form.rung.refuse_unfit(opened, weights, form)
    return weights


def shard_bytes(text: str) -> int:
    """Read a size such as 5GB or 500MiB. Raises InputRefused."""
    number = text.strip().rstrip("BKMGibkmg")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = int(float(number) * _UNITS[unit or "B"])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise InputRefused(f"--max-shard: '{text}' will not do: a size such as 5GB or 500MiB")
    return size


__all__ = ["export_form", "open_weights", "shard_bytes"]
