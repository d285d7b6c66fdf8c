"""One GGUF file of a LoRA for llama.cpp, to be put on a GGUF of the base in any precision: `--lora FILE` there.

What `lora` writes for PEFT, under llama.cpp's names: A (q, d_in) and B (d_out, q) of each linear, q and k with B's rows
in llama.cpp's order of rotation.
"""

import hashlib
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from qd2mora.errors import InputRefused
from qd2mora.merging.gguf_file import heads_of, package, rotated_in_pairs
from qd2mora.merging.lora import factors_of
from qd2mora.merging.shards import File
from qd2mora.merging.source import Source
from qd2mora.merging.static import Statics
from qd2mora.merging.writer import DTYPES


def refuse_unfit(source: Source) -> None:
    """Refuse a base that llama.cpp's llama is not. Raises InputRefused."""
    package()
    if type(source.config) is not LlamaConfig:
        kind = source.config.model_type
        raise InputRefused(f"--to gguf_lora: the base is a {kind}; --to lora and llama.cpp's converter will do")


def write_gguf_lora(statics: Statics, source: Source, folder: Path, *, name: str, dtype: str = "float32") -> list[File]:
    """Write NAME-lora.gguf. Raises InputRefused where llama.cpp has no place for an update, NotFinite."""
    gguf = package()
    rank, factors = factors_of(statics, "--to gguf_lora", DTYPES[dtype])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, source.config.num_hidden_layers)
    path = folder / f"{name}-lora.gguf"
    writer: Any = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    for linear, (down, up) in factors.items():
        found = names.get_name(linear)
        if found is None or f"{linear}.weight" not in source.names:
            raise InputRefused(f"--to gguf_lora: llama.cpp's llama has no matrix for {linear}; --to gguf will do")
        heads, rows = heads_of(linear, source.config), up.numpy()
        writer.add_tensor(f"{found}.weight.lora_a", down.numpy())
        writer.add_tensor(f"{found}.weight.lora_b", rows if heads is None else rotated_in_pairs(rows, heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with path.open("rb") as file:
        return [File(path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())]


__all__ = ["refuse_unfit", "write_gguf_lora"]
