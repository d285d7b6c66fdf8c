"""The frozen model: a LLaMA-family folder or hub id in NF4, or random weights of a named shape.

Norms, embeddings and the residual stream stay in the compute dtype: PEFT's k-bit preparation would lift them to
float32, which costs memory and time and buys nothing for a frozen base.
"""

import copy
import logging
import os
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import logging as transformers_logging

from qd2mora.base_cache import Entry
from qd2mora.base_files import RANDOM, fingerprint, first_line, folder_of, local_folder
from qd2mora.durable import save_pretrained
from qd2mora.errors import DamagedFile, InputRefused, nearest
from qd2mora.host_memory import give_back_large_blocks
from qd2mora.recipe import Base
from qd2mora.tensor_file import tensors_on_disk
from qd2mora.untrusted import check_config, check_safetensors, check_tokenizer, check_weights

# It reports, at import, that an optional CPU kernel is not installed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
# transformers 5.23 renames gradient checkpointing; 5.17 knows only the old names, which PEFT calls too.
warnings.filterwarnings("ignore", r".*gradient_checkpointing", FutureWarning)

_MODEL_PATTERNS = ["*config.json", "*.safetensors", "model.safetensors.index.json"]
_TOKENIZER_PATTERNS = ["*token*.json", "tokenizer.model", "*config.json", "vocab.*", "merges.txt", "*.jinja"]

# What transformers 5 raises on a config or tokenizer file that is not as it should be: it checks little of them itself.
_UNLOADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    SafetensorError,
    StrictDataclassError,
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA: what a random base is built from."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int = 32_000
    max_length: int = 4096
    tied: bool = False

    def config(self) -> LlamaConfig:
        """Return transformers' configuration of this shape."""
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.max_length,
            tie_word_embeddings=self.tied,
            pad_token_id=0,
        )


SHAPES = {
    "tiny": Shape(64, 192, 2, 4, 2, vocab=512, max_length=512),
    "llama-7b": Shape(4096, 11008, 32, 32, 32, max_length=2048),
    "llama2-7b": Shape(4096, 11008, 32, 32, 32),
    "llama2-13b": Shape(5120, 13824, 40, 40, 40),
    "llama2-70b": Shape(8192, 28672, 80, 64, 8),
    "llama3-8b": Shape(4096, 14336, 32, 32, 8, vocab=128_256, max_length=8192),
}


def default_device() -> torch.device:
    """Return this process's CUDA device where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def compute_dtype(base: Base, device: torch.device) -> torch.dtype:
    """Return the dtype that products run in: bfloat16 or float16 on a GPU, float32 on a CPU (16-bit is slow there)."""
    if base.compute_dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[base.compute_dtype]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def base_config(base: Base) -> LlamaConfig:
    """Return the model's configuration without reading weights. Raises InputRefused."""
    if base.model.startswith(RANDOM):
        return _shape(base.model).config()
    folder = folder_of(base.model, ["*config.json"])
    check_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except _UNLOADABLE as error:
        raise InputRefused(f"base.model: '{base.model}' cannot be loaded: {first_line(error)}") from error
    return config


def load_base(
    base: Base, device: torch.device | None = None, dtype: torch.dtype | None = None, *, keep_from: int | None = None
) -> PreTrainedModel:
    """Load the frozen model, linears in NF4 where the recipe says so, in evaluation mode on one device.

    `dtype` is that of products where they will not run on this device. 4-bit weights are read from `base.cache` where
    they are there, and kept there, where `keep_from` is given, if they take as many bytes at least.

    Raises InputRefused where the model is not there, not whole, or not loadable without running its own code.
    """
    device = device or default_device()
    dtype = dtype or compute_dtype(base, device)
    if device.type == "cpu":
        give_back_large_blocks()
    if not base.model.startswith(RANDOM):
        base_config(base)
        check_weights(folder_of(base.model, _MODEL_PATTERNS))  # there and plain files: an entry's hash is taken of them
    entry = _cache_entry(base, device, dtype)
    model = _kept(entry, base, device, dtype)
    if model is None:
        model = _made(base, device, dtype)
        if entry is not None and keep_from is not None:
            _keep(entry, model, keep_from, _quantization(base, dtype))
    # What an adapter is said to belong to; PEFT would look for a folder of random weights.
    name = "" if base.model.startswith(RANDOM) else base.model
    model.name_or_path = model.config._name_or_path = name
    return _finished(model)


def _made(base: Base, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Build a model from the files of its base, or from random numbers."""
    if base.model.startswith(RANDOM):
        return random_base(_shape(base.model), base, device, dtype=dtype)
    folder = folder_of(base.model, _MODEL_PATTERNS)
    return _read(folder, check_weights(folder), base.model, device, dtype, _quantization(base, dtype))


def _read(
    folder: Path,
    files: list[Path],
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None,
) -> PreTrainedModel:
    """Load a model from files that were checked, tensor by tensor: no more than one is in memory unquantised."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputRefused(f"base.model: '{name}' is a {config.model_type}, which does not continue texts")
    try:
        model, loading = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None,
            config=config,
            state_dict=tensors_on_disk(files),
            quantization_config=quantization,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # named below, where transformers points to a report that is not shown
            output_loading_info=True,
        )
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except (*_UNLOADABLE, RuntimeError, ImportError) as error:  # a config may ask for packages
        raise InputRefused(f"base.model: '{name}' cannot be loaded: {first_line(error)}") from error
    _refuse_partial(model, loading, name)
    return model


def _cache_entry(base: Base, device: torch.device, dtype: torch.dtype) -> Entry | None:
    """Return where 4-bit weights of a base are kept; None where they are not."""
    if base.cache in ("auto", "none") or base.quantization != "nf4":
        return None
    place = os.path.abspath(base.model) if os.path.isdir(base.model) else base.model
    settings = {"double_quant": base.double_quant, "compute_dtype": str(dtype), "device": device.type}
    versions = {package: version(package) for package in ("bitsandbytes", "torch", "transformers")}
    return Entry.of(Path(base.cache), place, settings, {"base": fingerprint(base), **versions})


def _kept(entry: Entry | None, base: Base, device: torch.device, dtype: torch.dtype) -> PreTrainedModel | None:
    """Return the model of a cache entry; None where there is none that is whole."""
    if entry is None:
        return None
    with entry.opened() as is_whole:
        if not is_whole:
            return None
        try:
            check_config(entry.folder)
            files = sorted(entry.folder.glob("*.safetensors"))
            for path in files:
                check_safetensors(path)
            return _read(entry.folder, files, base.model, device, dtype, None)
        except (InputRefused, DamagedFile) as error:  # somebody else's, sealed as ours are
            entry.say_made_anew(str(error))
            return None


def _keep(entry: Entry, model: PreTrainedModel, least: int, quantization: BitsAndBytesConfig | None) -> None:
    """Write the weights of a model that was quantised just now, if they are large enough."""
    tensors: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:  # a head that is the embedding is written once
            tensors[name] = tensor
            seen.add(tensor.data_ptr())
    if sum(tensor.nbytes for tensor in tensors.values()) < least:
        return
    config = copy.deepcopy(model.config)
    config.quantization_config = quantization  # random weights were quantised by hand

    def configs(folder: Path) -> None:
        save_pretrained(config, folder)
        if model.generation_config is not None:
            save_pretrained(model.generation_config, folder)

    entry.write(tensors, configs)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer with a pad token that is never mistaken for the end of a text.

    Where none is declared: the unknown token, else an existing reserved token, else the end token; padding is masked
    by position in any case, so that a real end token in a row keeps its label. Raises InputRefused.
    """
    if model.startswith(RANDOM):
        raise InputRefused(f"base.model: '{model}' has random weights and no tokenizer; it can be planned and timed")
    folder = folder_of(model, _TOKENIZER_PATTERNS, needs="tokenizer_config.json")
    check_tokenizer(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except _UNLOADABLE as error:
        raise InputRefused(f"base.model: no tokenizer in '{model}': {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise InputRefused(f"base.model: the tokenizer of '{model}' has no end token; set eos_token in its config")
    if tokenizer.pad_token_id is None:
        known = tokenizer.get_vocab()
        names = ("<pad>", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>")
        reserved = [name for name in names if name in known]
        tokenizer.pad_token = reserved[0] if reserved else tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def random_base(
    shape: Shape, base: Base, device: torch.device, seed: int = 0, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Build a model of random weights, quantising linear by linear: the 16-bit model is never in memory."""
    dtype = dtype or compute_dtype(base, device)
    config = shape.config()
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head" and base.quantization == "nf4":
            weight = torch.empty(module.weight.shape, device=device, dtype=dtype).normal_(0, 0.02, generator=generator)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nf4_linear(weight, base, dtype))
    # Norm weights start at one; rotary tables are buffers that the meta build leaves empty.
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            value = torch.empty(parameter.shape, device=device, dtype=dtype)
            value = value.fill_(1.0) if parameter.dim() == 1 else value.normal_(0, 0.02, generator=generator)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Parameter(value, requires_grad=False))
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model.tie_weights()
    return _finished(model)


def is_nf4(linear: nn.Module) -> bool:
    """Tell whether a linear holds 4-bit weights."""
    return hasattr(getattr(linear, "weight", None), "quant_state")


def dense_weight(linear: nn.Linear) -> Tensor:
    """Return a linear's weight as float32, (d_out, d_in), dequantised where it is 4-bit; a fresh tensor."""
    if not is_nf4(linear):
        return linear.weight.detach().float().clone()
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = linear.weight
    return dequantize_4bit(weight.data, weight.quant_state).float()


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # transformers has embeddings ask for a gradient, which reentrant recomputing alone needs: it would stay, and be
    # computed, in vain.
    model.disable_input_require_grads()


def _finished(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if is_nf4(module):
            # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a weight in place at its first forward in evaluation:
            # absmax is rounded to bfloat16, backward fails, and widths not divisible by 32 raise.
            linear: Any = module
            linear.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False).eval()


def _refuse_partial(model: PreTrainedModel, loading: dict[str, Any], name: str) -> None:
    """Refuse a model whose files lack a tensor or hold one of another size: transformers would make one up."""
    missing = sorted(loading["missing_keys"])
    if missing:
        raise InputRefused(f"base.model: '{name}' is not whole: no weights for {missing[0]} ({len(missing)} missing)")
    # Of 4-bit weights only the quantisation state remembers the shape, and transformers 5.23 does not compare it.
    packed: list[tuple[str, Any]] = [pair for pair in model.named_modules() if is_nf4(pair[1])]
    wrong = sorted(key for key, *_ in loading["mismatched_keys"]) + [
        f"{key}.weight"
        for key, linear in packed
        if tuple(linear.weight.quant_state.shape) != (linear.out_features, linear.in_features)
    ]
    if wrong:
        raise InputRefused(f"base.model: '{name}': the size of {wrong[0]} is not the one its config.json gives")


def nf4_linear(weight: Tensor, base: Base, dtype: torch.dtype) -> nn.Linear:
    """Return a 4-bit linear of a dense weight (d_out, d_in) on its device, without a bias, as loading makes them."""
    import bitsandbytes as bnb

    linear = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    linear.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=base.double_quant, module=linear
    ).to(weight.device)
    return linear


def _quantization(base: Base, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if base.quantization == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=base.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def _shape(model: str) -> Shape:
    name = model.removeprefix(RANDOM)
    if name not in SHAPES:
        raise InputRefused(f"base.model: no shape '{name}'; {nearest(name, SHAPES)}")
    return SHAPES[name]


__all__ = [
    "SHAPES",
    "Shape",
    "base_config",
    "compute_dtype",
    "default_device",
    "dense_weight",
    "enable_checkpointing",
    "fingerprint",
    "is_nf4",
    "load_base",
    "load_tokenizer",
    "local_folder",
    "nf4_linear",
    "random_base",
]
