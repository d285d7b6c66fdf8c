"""One GGUF file for llama.cpp, in f16, bf16 or Q8_0 through the `gguf` package (optional), tensor by tensor.

Smaller ones are made of the f16 file by llama.cpp's own quantiser, see `gguf_quantised`.

What a family is called there, and how its tensors lie, is a row of `base/gguf_forms.py`, which GGUF bases are read by
too. Vectors stay float32, as llama.cpp wants them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from qd2mora.base.device import FLOATS
from qd2mora.base.gguf_base import gguf_names, heads_of
from qd2mora.base.gguf_forms import FORMS, KEYS, check_fixed, context_length, head_dim_of, llama3_factors, rope_of
from qd2mora.base.tokenizer import save_tokenizer
from qd2mora.disk.file_hash import size_and_hash
from qd2mora.disk.gguf_header import gguf_package
from qd2mora.disk.tensor_file import TensorToWrite
from qd2mora.errors import InputRefused
from qd2mora.merging.base_weights import BaseWeights
from qd2mora.merging.gguf_quantised import QUANTISED, llama_package, quantised
from qd2mora.merging.gguf_vocab import Vocabulary, vocabulary_of
from qd2mora.merging.modelfile import NAME as MODELFILE
from qd2mora.merging.modelfile import modelfile_of
from qd2mora.merging.rung import ExportForm, Rung, WriteFolder, Written
from qd2mora.merging.static_updates import Statics
from qd2mora.merging.updated_weights import WeightUpdate, updated_weights, weight_updates_of
from qd2mora.run_folder import OpenRun

_FILE_ENDS = {"float16": "f16", "bfloat16": "bf16", "q8_0": "q8_0"}
_PACKED = {"bfloat16": "BF16", "q8_0": "Q8_0"}
"""Kinds that numpy does not have, as the package names them."""

Numbers = NDArray[np.generic]


def vocabulary_for(
    weights: BaseWeights, tokenizer: PreTrainedTokenizerBase, *, with_vocabulary: bool = True
) -> Vocabulary | None:
    """Return the vocabulary, where one is wanted; refuse a model that llama.cpp has not. Raises InputRefused."""
    config = weights.config
    check_family(config, "--to gguf")
    if not with_vocabulary:
        return None
    return vocabulary_of(tokenizer, config.vocab_size)


def check_family(config: PreTrainedConfig, what: str) -> None:
    """Refuse a model that llama.cpp does not run as transformers does. Raises InputRefused."""
    gguf_package()
    if config.model_type not in FORMS:
        raise InputRefused(f"{what}: the base is a {config.model_type}, which is not written; --to hf will do")
    check_fixed(config, what)


def write_gguf(
    weights: BaseWeights,
    tokenizer: PreTrainedTokenizerBase,
    updates: Mapping[str, WeightUpdate],
    folder: Path,
    *,
    name: str,
    dtype: str = "float16",
    with_vocabulary: bool = True,
) -> Written:
    """Write `NAME-f16.gguf`, `-bf16` or `-q8_0` into a folder; `dtype` is float16, bfloat16 or q8_0.

    Raises InputRefused where llama.cpp has no such model or tokenizer, NotFinite where a weight does not fit float16.
    """
    written, path = Written(), folder / f"{name}-{_FILE_ENDS[dtype]}.gguf"
    vocabulary = vocabulary_for(weights, tokenizer, with_vocabulary=with_vocabulary)
    writer = gguf_package().GGUFWriter(path, FORMS[weights.config.model_type].arch)
    _add_settings(writer, weights.config, name, dtype)
    if vocabulary is None:
        writer.add_tokenizer_model("none")
        save_tokenizer(tokenizer, folder)
    else:
        _add_vocabulary(writer, vocabulary, tokenizer)
    _write_tensors(writer, _tensors(weights, updates, dtype, written.rounding), _factors(weights.config))
    written.files = {path.name: size_and_hash(path)}
    return written


def _tensors(
    weights: BaseWeights, updates: Mapping[str, WeightUpdate], dtype: str, rounding: dict[str, float]
) -> "list[_GgufTensor]":
    if dtype in FLOATS:
        entries = updated_weights(weights, updates, FLOATS[dtype], rounding)
    else:  # float32 until the file: an 8-bit number is rounded once
        entries = updated_weights(weights, updates, torch.float32, rounding, _read_back_from_q8)
    names = gguf_names(weights.config)
    found = []
    for each in entries:
        if each.name not in names:
            raise InputRefused(f"--to gguf: llama.cpp's {weights.config.model_type} has no place for {each.name}")
        found.append(_GgufTensor.of(each, names[each.name], weights.config, _PACKED.get(dtype)))
    return found


def _write_tensors(writer: Any, tensors: "list[_GgufTensor]", rope_factors: Numbers | None) -> None:
    """Write all that was added to a file, and tensors one by one: what they are stands before what they hold."""
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    for tensor in tensors:
        # Names, kinds and sizes first: the numbers of each are made, written and dropped when its turn comes.
        writer.add_tensor_info(tensor.name, tensor.byte_shape, np.dtype(tensor.kind), tensor.num_bytes, tensor.raw_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if rope_factors is not None:
        writer.write_tensor_data(rope_factors)
    for tensor in tensors:
        writer.write_tensor_data(tensor.content())
    writer.close()


@dataclass(frozen=True)
class _GgufTensor:
    """One tensor of the file: its name there, its kind, and its numbers, made when its turn comes.

    `packed`: the package's name of a kind that numpy does not have, whose numbers are bytes here.
    """

    entry: TensorToWrite
    name: str
    kind: str
    packed: str | None
    heads: int | None
    offset: float

    @classmethod
    def of(cls, entry: TensorToWrite, name: str, config: PreTrainedConfig, packed: str | None) -> "_GgufTensor":
        """Return a tensor of this name there, in the kind that its shape takes."""
        kind = "float32"
        if packed is not None and _divides(entry.shape, packed):
            kind = "uint8"
        elif len(entry.shape) == 2:
            kind = "float16"
        offset = 0.0
        if FORMS[config.model_type].adds_one and entry.name.endswith("norm.weight"):
            offset = 1.0
        return cls(entry, name, kind, packed if kind == "uint8" else None, heads_of(entry.name, config), offset)

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Its shape; of packed numbers, the last axis counts bytes."""
        if self.packed is None:
            return self.entry.shape
        numbers, num_bytes = _block_of(self.packed)
        return (*self.entry.shape[:-1], self.entry.shape[-1] // numbers * num_bytes)

    @property
    def raw_kind(self) -> object:
        """The format's own name of a kind that numpy does not have."""
        return None if self.packed is None else gguf_package().GGMLQuantizationType[self.packed]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.byte_shape) * np.dtype(self.kind).itemsize

    def content(self) -> Numbers:
        """Return all numbers as the file holds them."""
        parts = [self._narrow(block) for block in self.entry.blocks()]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if self.offset:
            whole = whole + np.asarray(self.offset, whole.dtype)
        # Quantised before: a block of numbers and its scale lie within one row, and whole rows change places.
        return np.ascontiguousarray(rotated_in_pairs(whole, self.heads))

    def _narrow(self, block: Tensor) -> Numbers:
        if self.packed is not None:
            return _quantized(block, self.packed)
        return block.float().numpy().astype(self.kind)


def _block_of(packed: str) -> tuple[int, int]:
    """Return how many numbers share a scale, and their bytes."""
    gguf = gguf_package()
    numbers, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[packed]]
    return numbers, num_bytes


def _divides(shape: tuple[int, ...], packed: str) -> bool:
    return len(shape) == 2 and shape[-1] % _block_of(packed)[0] == 0


def _quantized(block: Tensor, packed: str) -> Numbers:
    gguf = gguf_package()
    quantized: Numbers = gguf.quants.quantize(block.float().numpy(), gguf.GGMLQuantizationType[packed])
    return quantized


def _read_back_from_q8(block: Tensor) -> Tensor:
    """Return a weight's rows as a Q8_0 file gives them back, float32: matrices that do not divide are float16 there."""
    if not _divides(tuple(block.shape), "Q8_0"):
        return block.half().float()
    gguf = gguf_package()
    return torch.from_numpy(gguf.quants.dequantize(_quantized(block, "Q8_0"), gguf.GGMLQuantizationType.Q8_0))


def rotated_in_pairs(rows: Numbers, heads: int | None) -> Numbers:
    """Reorder each head's rows from halves (0, 1, ..., h/2, ...) to pairs (0, h/2, 1, h/2 + 1, ...), if of heads."""
    if heads is None:
        return rows
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _add_settings(writer: Any, config: PreTrainedConfig, name: str, dtype: str) -> None:
    gguf, rope, form = gguf_package(), rope_of(config), FORMS[config.model_type]
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    for field, key in (KEYS | dict(form.keys)).items():
        value = getattr(config, field)
        if field == "max_position_embeddings":
            value = context_length(config)
        if value is None:
            continue
        if isinstance(value, float) or field in _FRACTIONS:
            writer.add_float32(f"{form.arch}.{key}", float(value))
        else:
            writer.add_uint32(f"{form.arch}.{key}", value)
    head_dim = head_dim_of(config)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{_FILE_ENDS[dtype].upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if form.arch == "phi3":  # llama.cpp asks for it, and leaves the window out
        writer.add_sliding_window(context_length(config))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


_FRACTIONS = (
    *("rms_norm_eps", "attn_logit_softcapping", "final_logit_softcapping", "attention_multiplier"),
    *("embedding_multiplier", "residual_multiplier", "logits_scaling"),
)
"""Fields that llama.cpp reads as floats, whatever they are written as in a configuration."""


def _add_vocabulary(writer: Any, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> None:
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
    # What a tokenizer puts around a text is seen on a letter: its files say so in several ways.
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _factors(config: PreTrainedConfig) -> Numbers | None:
    """Return the file's table of frequencies; None where a model does not scale its positions as LLaMA 3.1 does."""
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    factors: Numbers = llama3_factors(rope, head_dim_of(config)).numpy()
    return factors


def _refuse_unfit(opened: OpenRun, weights: BaseWeights, form: ExportForm) -> None:
    vocabulary_for(weights, opened.tokenizer, with_vocabulary=form.with_vocabulary)
    if form.dtype in QUANTISED:
        llama_package()


def _prepare(opened: OpenRun, weights: BaseWeights, statics: Statics, form: ExportForm) -> WriteFolder:
    updates, tokenizer, name = weight_updates_of(opened.model, statics), opened.tokenizer, opened.folder.name
    # Ollama takes a text, which a file of token ids alone cannot.
    modelfile = modelfile_of(opened, f"{name}-{_FILE_ENDS.get(form.dtype, form.dtype)}.gguf")

    def write(folder: Path) -> Written:
        dtype = "float16" if form.dtype in QUANTISED else form.dtype
        how = {"name": name, "dtype": dtype}
        written = write_gguf(weights, tokenizer, updates, folder, **how, with_vocabulary=form.with_vocabulary)
        if form.with_vocabulary:
            (folder / MODELFILE).write_text(modelfile, encoding="utf-8")
        return quantised(written, folder, form.dtype) if form.dtype in QUANTISED else written

    return write


RUNG = Rung(
    _prepare, ("float16", "bfloat16", "q8_0", *QUANTISED), _refuse_unfit, may_lack_vocabulary=True, measured=QUANTISED
)

__all__ = ["RUNG", "check_family", "rotated_in_pairs", "write_gguf"]
