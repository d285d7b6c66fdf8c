"""One GGUF file for llama.cpp, in f16 or Q8_0, through the `gguf` package (optional), tensor by tensor.

The architecture is llama's: rows of q and k are reordered within each head, because llama.cpp rotates neighbouring
pairs where transformers rotates halves. Vectors stay float32, as llama.cpp wants them.
"""

import hashlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerBase

from qd2mora.disk.durable import save_pretrained
from qd2mora.errors import InputRefused
from qd2mora.merging.folds import Fold
from qd2mora.merging.gguf_vocab import Vocabulary, vocabulary_of
from qd2mora.merging.shards import Entry, File
from qd2mora.merging.source import Source
from qd2mora.merging.writer import Written, entries_of

BLOCK = 32
"""Numbers that share one scale in Q8_0."""


def package() -> Any:
    """Return the `gguf` module. Raises InputRefused where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise InputRefused("--to gguf needs the gguf package: pip install 'qd2mora[gguf]'") from None
    logging.getLogger("gguf").setLevel(logging.ERROR)
    return gguf


def refuse_unfit(
    source: Source, tokenizer: PreTrainedTokenizerBase, *, with_vocabulary: bool = True
) -> Vocabulary | None:
    """Return the vocabulary, where one is wanted; refuse a model that llama.cpp's llama is not. Raises InputRefused."""
    package()
    config = source.config
    if type(config) is not LlamaConfig:
        raise InputRefused(f"--to gguf: the base is a {config.model_type}; --to hf and llama.cpp's converter will do")
    kind = _rope(config)["rope_type"]
    if kind not in ("default", "linear", "llama3"):
        raise InputRefused(f"--to gguf: position scaling '{kind}' is not written; --to hf will do")
    return vocabulary_of(tokenizer, config.vocab_size) if with_vocabulary else None


def write_gguf(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    folds: Mapping[str, Fold],
    folder: Path,
    *,
    name: str,
    dtype: str = "float16",
    with_vocabulary: bool = True,
) -> Written:
    """Write `NAME-f16.gguf` or `NAME-q8_0.gguf` into a folder; `dtype` is float16 or q8_0.

    Raises InputRefused where llama.cpp has no such model or tokenizer, NotFinite where a weight does not fit float16.
    """
    gguf, written = package(), Written()
    vocabulary = refuse_unfit(source, tokenizer, with_vocabulary=with_vocabulary)
    path = folder / f"{name}-{'f16' if dtype == 'float16' else dtype}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    _add_settings(writer, source.config, name, dtype)
    if vocabulary is None:
        writer.add_tokenizer_model("none")
        save_pretrained(tokenizer, folder)
    else:
        _add_vocabulary(writer, vocabulary, tokenizer)
    # Float32 until here, so that an 8-bit number is rounded once.
    narrow = torch.float16 if dtype == "float16" else torch.float32
    read_back = _dequantized if dtype == "q8_0" else None
    tensors = [_Tensor(each, source.config, dtype) for each in entries_of(source, folds, narrow, written, read_back)]
    if _rope(source.config)["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(source.config))
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.byte_shape, np.dtype(tensor.kind), tensor.num_bytes, tensor.raw_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if _rope(source.config)["rope_type"] == "llama3":
        writer.write_tensor_data(_llama3_factors(source.config))
    for tensor in tensors:
        writer.write_tensor_data(tensor.content())
    writer.close()
    with path.open("rb") as file:
        written.files = [File(path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())]
    return written


class _Tensor:
    """One tensor of the file: its name there, its kind, and its numbers, made when its turn comes."""

    def __init__(self, entry: Entry, config: LlamaConfig, dtype: str) -> None:
        gguf = package()
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        found = names.get_name(entry.name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise InputRefused(f"--to gguf: llama.cpp's llama has no place for {entry.name}")
        self.entry, self.name, self.config = entry, found, config
        is_matrix = len(entry.shape) == 2
        self.is_q8 = dtype == "q8_0" and _takes_q8(entry.shape)
        self.kind = "uint8" if self.is_q8 else "float16" if is_matrix else "float32"
        self.raw_kind = gguf.GGMLQuantizationType.Q8_0 if self.is_q8 else None
        width = entry.shape[-1] // BLOCK * (BLOCK + 2) if self.is_q8 else entry.shape[-1]
        self.byte_shape = (*entry.shape[:-1], width)
        self.num_bytes = math.prod(self.byte_shape) * np.dtype(self.kind).itemsize

    def content(self) -> NDArray[Any]:
        """Return all numbers as the file holds them."""
        parts = [self._narrow(block) for block in self.entry.blocks()]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        heads = heads_of(self.entry.name.rpartition(".")[0], self.config)
        return whole if heads is None else np.ascontiguousarray(rotated_in_pairs(whole, heads))

    def _narrow(self, block: Tensor) -> NDArray[Any]:
        return _quantized(block) if self.is_q8 else block.float().numpy().astype(self.kind)


def _takes_q8(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[-1] % BLOCK == 0


def _quantized(block: Tensor) -> NDArray[Any]:
    gguf = package()
    quantized: NDArray[Any] = gguf.quants.quantize(block.numpy(), gguf.GGMLQuantizationType.Q8_0)
    return quantized


def _dequantized(block: Tensor) -> Tensor:
    """Return the numbers of a weight's rows as a Q8_0 file gives them back: matrices that do not divide are float16."""
    if not _takes_q8(tuple(block.shape)):
        return block.half()
    gguf = package()
    return torch.from_numpy(gguf.quants.dequantize(_quantized(block), gguf.GGMLQuantizationType.Q8_0))


def heads_of(linear: str, config: LlamaConfig) -> int | None:
    """Return how many heads the rows of a linear belong to, for q and k; None for others."""
    if linear.endswith(".q_proj"):
        return config.num_attention_heads
    return config.num_key_value_heads if linear.endswith(".k_proj") else None


def rotated_in_pairs(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Reorder each head's rows from halves (0, 1, ..., h/2, ...) to pairs (0, h/2, 1, h/2 + 1, ...)."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _add_settings(writer: Any, config: Any, name: str, dtype: str) -> None:
    gguf, rope = package(), _rope(config)
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if dtype == "float16" else gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _add_vocabulary(writer: Any, vocabulary: Vocabulary, tokenizer: Any) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.cut)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.adds_space)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for number, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if number is not None:
            add(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _rope(config: Any) -> dict[str, Any]:
    return dict(config.rope_parameters)


def _llama3_factors(config: Any) -> NDArray[Any]:
    """Return what llama.cpp divides each rotation's frequency by: 1 for short waves, the factor for long ones."""
    rope = _rope(config)
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    waves = 2 * math.pi * float(rope["rope_theta"]) ** half
    factor, length = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((length / waves - low) / (high - low)).clamp(0, 1)
    factors: NDArray[Any] = (1 / ((1 - smooth) / factor + smooth)).float().numpy()
    return factors


__all__ = ["heads_of", "package", "refuse_unfit", "rotated_in_pairs", "write_gguf"]
