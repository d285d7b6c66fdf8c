"""One GGUF file of a LoRA for llama.cpp, to be put on a GGUF of the base in any precision: `--lora FILE` there.

What `lora` writes for PEFT, under llama.cpp's names: A (q, d_in) and B (d_out, q) of each linear, q and k with B's rows
in llama.cpp's order of rotation.
"""

from pathlib import Path
from typing import Any

from qd2mora.base.device import FLOATS
from qd2mora.base.gguf_base import gguf_names, heads_of
from qd2mora.base.gguf_forms import FORMS
from qd2mora.disk.file_hash import SizeAndHash, size_and_hash
from qd2mora.disk.gguf_header import gguf_package
from qd2mora.errors import InputRefused
from qd2mora.merging.base_weights import BaseWeights
from qd2mora.merging.gguf_file import check_family, rotated_in_pairs
from qd2mora.merging.lora import factors_of
from qd2mora.merging.modelfile import NAME as MODELFILE
from qd2mora.merging.modelfile import adapter_modelfile_of
from qd2mora.merging.rung import ExportForm, Rung, WriteFolder, Written
from qd2mora.merging.static_updates import Statics
from qd2mora.run_folder import OpenRun


def write_gguf_lora(
    statics: Statics, weights: BaseWeights, folder: Path, *, name: str, dtype: str = "float32"
) -> dict[str, SizeAndHash]:
    """Write NAME-lora.gguf. Raises InputRefused where llama.cpp has no place for an update, NotFinite."""
    gguf = gguf_package()
    rank, factors = factors_of(statics, "--to gguf_lora", FLOATS[dtype])
    names = gguf_names(weights.config)
    path = folder / f"{name}-lora.gguf"
    writer: Any = gguf.GGUFWriter(path, FORMS[weights.config.model_type].arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # alpha = rank: the scale is 1, ours is in B already (`factors_of`).
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    for linear, (down, up) in factors.items():
        weight = f"{linear}.weight"
        if weight not in names or weight not in weights.names:
            raise InputRefused(f"--to gguf_lora: llama.cpp has no matrix for {linear}; --to gguf will do")
        writer.add_tensor(f"{names[weight]}.lora_a", down.numpy())
        writer.add_tensor(f"{names[weight]}.lora_b", rotated_in_pairs(up.numpy(), heads_of(weight, weights.config)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {path.name: size_and_hash(path)}


def _refuse_unfit(opened: OpenRun, weights: BaseWeights, form: ExportForm) -> None:
    check_family(weights.config, "--to gguf_lora")


def _prepare(opened: OpenRun, weights: BaseWeights, statics: Statics, form: ExportForm) -> WriteFolder:
    updates, name, dtype = dict(statics), opened.folder.name, form.dtype
    modelfile = adapter_modelfile_of(opened, f"{name}-lora.gguf")

    def write(folder: Path) -> Written:
        (folder / MODELFILE).write_text(modelfile, encoding="utf-8")
        return Written(write_gguf_lora(updates, weights, folder, name=name, dtype=dtype))

    return write


RUNG = Rung(_prepare, ("float32", "float16"), _refuse_unfit, holds_no_base=True)

__all__ = ["RUNG"]
