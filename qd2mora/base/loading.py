"""The frozen model: a LLaMA-family folder, hub id or GGUF file in NF4, or random weights of a named shape.

Norms, embeddings and the residual stream stay in the compute dtype: PEFT's k-bit preparation would lift them to
float32, which costs memory and time and buys nothing for a frozen base.
"""

import copy
import os
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from qd2mora.base.cache import CachedWeights
from qd2mora.base.device import compute_dtype, default_device
from qd2mora.base.families import family_of
from qd2mora.base.files import RANDOM, UNLOADABLE, fingerprint, first_line, folder_of, is_gguf, local_folder
from qd2mora.base.gguf_base import StoredBlocks, gguf_config, gguf_generation, gguf_tensors
from qd2mora.base.host_memory import give_back_large_blocks
from qd2mora.base.known_models import known_config, known_name
from qd2mora.base.nf4 import is_nf4, nf4_config, settled
from qd2mora.base.random_weights import random_base
from qd2mora.base.shapes import shape_of
from qd2mora.disk.durable import save_pretrained
from qd2mora.disk.sealed import verify_where_ours
from qd2mora.disk.tensor_file import StoredTensor, is_finite, stored_tensors
from qd2mora.disk.untrusted import check_config, check_weights
from qd2mora.errors import DamagedFile, InputRefused
from qd2mora.recipe import Base

StoredWeights = Mapping[str, StoredTensor | StoredBlocks]
"""A base's weights by name, read one by one when they are asked for."""

_MODEL_PATTERNS = ["*config.json", "*.safetensors", "model.safetensors.index.json"]

_LAYER = re.compile(r"\blayers\.(\d+)\.")


def base_config(base: Base) -> PreTrainedConfig:
    """Return the model's configuration without reading weights. Raises InputRefused."""
    if base.model.startswith(RANDOM):
        return shape_of(base.model).config()
    try:
        if is_gguf(base.model):
            config = gguf_config(base.model)
        else:
            folder = folder_of(base.model, ["*config.json"])
            check_config(folder)
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        family_of(config, base.model)
        _build_one_layer(config)
    except (*UNLOADABLE, RuntimeError, ImportError, AssertionError) as error:
        raise InputRefused(f"base.model: '{base.model}' cannot be loaded: {first_line(error)}") from error
    _refuse_8_bit(config, base.model)
    return config


def known_shape(base: Base) -> str | None:
    """Return the name of a hub id in the table of known models, where its files are not on this machine."""
    if local_folder(base.model) is not None:
        return None
    return known_name(base.model)


def planning_config(base: Base) -> PreTrainedConfig:
    """Return the configuration that a plan needs: of files that are here, else of the table, else of the hub.

    With the table no network and no licence is needed. Weights that lie beside a configuration have its sizes, or the
    plan would be of another model than the run. Raises InputRefused.
    """
    name = known_shape(base)
    if name is not None:
        return known_config(name)
    config = base_config(base)
    if is_gguf(base.model) or (os.path.isdir(base.model) and any(Path(base.model).glob("*.safetensors"))):
        _refuse_other_sizes(config, stored_weights(base.model), base.model)
    return config


def _refuse_8_bit(config: PreTrainedConfig, name: str) -> None:
    """Refuse weights stored in bitsandbytes' 8 bits: no adapter here runs on them. Raises InputRefused."""
    stored = getattr(config, "quantization_config", None)
    if isinstance(stored, dict) and stored.get("load_in_8bit"):
        raise InputRefused(
            f"base.model: '{name}' is stored in 8 bits; name the 16-bit model, which is quantised to NF4 as it loads, "
            "or one in bitsandbytes' 4 bits"
        )


def _build_one_layer(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a layer without memory: names of functions and sizes that do not go together are found before the rest."""
    one = copy.deepcopy(config)
    if getattr(one, "layer_types", None):
        one.layer_types = one.layer_types[:1]
    one.num_hidden_layers = 1
    with torch.device("meta"):
        model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(one)
    return model


def _refuse_other_sizes(config: PreTrainedConfig, stored: StoredWeights, name: str) -> None:
    """Refuse weights of other sizes than a configuration gives, before memory for the latter is taken.

    Layers are counted, and those of the first compared; the rest is compared as it is loaded. Raises InputRefused.
    """
    numbers = [int(found[1]) for key in stored if (found := _LAYER.search(key))]
    if numbers and max(numbers) + 1 < config.num_hidden_layers:
        raise InputRefused(
            f"base.model: '{name}' is not whole: no weights for layer {max(numbers) + 1} of {config.num_hidden_layers}"
        )
    for key, tensor in _build_one_layer(config).state_dict().items():
        there = stored.get(key)
        # Packed weights do not tell their shape.
        if there is not None and there.dtype.is_floating_point and tuple(there.shape) != tuple(tensor.shape):
            raise InputRefused(f"base.model: '{name}': the size of {key} is not the one its config.json gives")


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
    read: tuple[PreTrainedConfig, StoredWeights] | None = None
    if not base.model.startswith(RANDOM):
        config = base_config(base)
        verify_where_ours(_folder_of_files(base.model))  # an export may be a base
        read = config, stored_weights(base.model)  # there and plain files: an entry's hash is taken of them
        _refuse_other_sizes(*read, base.model)
    cached = _cached_weights(base, device, dtype)
    model = None if cached is None else _from_cache(cached, base.model, device, dtype)
    if model is None:
        model = _build_model(base, read, device, dtype)
        if cached is not None and keep_from is not None:
            _write_cache(cached, model, keep_from, nf4_config(base, dtype))
    # What an adapter is said to belong to; PEFT would look for a folder of random weights.
    name = "" if base.model.startswith(RANDOM) else base.model
    model.name_or_path = model.config._name_or_path = name
    return settled(model)


def stored_weights(model: str) -> StoredWeights:
    """Return a base's weights by name, to be read one by one. Raises InputRefused, DamagedFile."""
    if is_gguf(model):
        return gguf_tensors(model)
    return stored_tensors(check_weights(folder_of(model, _MODEL_PATTERNS)))


def write_generation(model: str, folder: Path) -> None:
    """Write a base's generation_config.json into a folder as the base has it; of a GGUF file, what its header says."""
    if is_gguf(model):
        save_pretrained(gguf_generation(model), folder)
        return
    path = folder_of(model, _MODEL_PATTERNS) / "generation_config.json"
    if path.is_file():
        (folder / path.name).write_bytes(path.read_bytes())


def _folder_of_files(model: str) -> Path:
    if is_gguf(model):
        return Path(model).parent
    return folder_of(model, _MODEL_PATTERNS)


def _build_model(
    base: Base, read: tuple[PreTrainedConfig, StoredWeights] | None, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """Build a model from what its files hold, or where none were read from random numbers."""
    if read is None:
        model = random_base(shape_of(base.model), base, device, dtype=dtype)
        model.generation_config = ends_alone(model.generation_config)
        return model
    model = _from_weights(*read, base.model, device, dtype, nf4_config(base, dtype))
    folder = None if is_gguf(base.model) else _folder_of_files(base.model)
    return _with_generation(model, folder, base.model)


def _from_weights(
    config: PreTrainedConfig,
    weights: StoredWeights,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None,
) -> PreTrainedModel:
    """Load a model from weights that were checked, tensor by tensor: no more than one is in memory unquantised."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputRefused(f"base.model: '{name}' is a {config.model_type}, which does not continue texts")
    try:
        model, loading = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None,
            config=config,
            state_dict=dict(weights),
            quantization_config=quantization,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # named below, where transformers points to a report that is not shown
            output_loading_info=True,
        )
    except (*UNLOADABLE, RuntimeError, ImportError) as error:  # a config may ask for packages
        raise InputRefused(f"base.model: '{name}' cannot be loaded: {first_line(error)}") from error
    _refuse_partial(model, loading, name)
    _refuse_not_finite(model, name)
    return model


def _with_generation(model: PreTrainedModel, folder: Path | None, name: str) -> PreTrainedModel:
    """Give a model its files' own way to continue texts; `folder`: where they lie, None for a GGUF file."""
    try:
        if folder is None:
            model.generation_config = gguf_generation(name)
        elif (folder / "generation_config.json").is_file():
            model.generation_config = ends_alone(GenerationConfig.from_pretrained(folder))
    except UNLOADABLE as error:
        raise InputRefused(f"base.model: '{name}' cannot be loaded: {first_line(error)}") from error
    return model


def ends_alone(settings: GenerationConfig) -> GenerationConfig:
    """Return what of a base's settings is read: its tokens. Beams, samples and limits of its own would join ours."""
    ids = ("eos_token_id", "bos_token_id", "pad_token_id")
    return GenerationConfig(**{name: getattr(settings, name) for name in ids})


def _cached_weights(base: Base, device: torch.device, dtype: torch.dtype) -> CachedWeights | None:
    """Return where 4-bit weights of a base are kept; None where they are not."""
    if base.cache in ("auto", "none") or base.quantization != "nf4":
        return None
    place = base.model
    if os.path.isdir(base.model):
        place = os.path.abspath(base.model)
    settings: dict[str, object] = {
        "double_quant": base.double_quant,
        "compute_dtype": str(dtype),
        "device": device.type,
    }
    versions = {package: version(package) for package in ("bitsandbytes", "torch", "transformers")}
    return CachedWeights.of(Path(base.cache), place, settings, {"base": fingerprint(base), **versions})


def _from_cache(cached: CachedWeights, name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel | None:
    """Return the model of cached weights; None where there are none that are whole."""
    with cached.opened() as is_whole:
        if not is_whole:
            return None
        try:
            check_config(cached.folder)
            config = AutoConfig.from_pretrained(cached.folder, trust_remote_code=False)
            weights = stored_tensors(sorted(cached.folder.glob("*.safetensors")))
            model = _from_weights(config, weights, name, device, dtype, None)
            return _with_generation(model, cached.folder, name)
        except (InputRefused, DamagedFile) as error:  # somebody else's, sealed as ours are
            cached.say_made_anew(str(error))
            return None


def _write_cache(
    cached: CachedWeights, model: PreTrainedModel, least: int, quantization: BitsAndBytesConfig | None
) -> None:
    """Write the weights of a model that was quantised just now, if they take `least` bytes."""
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

    cached.write(tensors, configs)


def _refuse_partial(model: PreTrainedModel, loading: dict[str, Any], name: str) -> None:
    """Refuse a model whose files lack a tensor or hold one of another size: transformers would make one up."""
    missing = sorted(loading["missing_keys"])
    if missing:
        raise InputRefused(f"base.model: '{name}' is not whole: no weights for {missing[0]} ({len(missing)} missing)")
    # Of 4-bit weights only the quantisation state remembers the shape, and transformers 5.23 does not compare it.
    packed: list[tuple[str, Any]] = [pair for pair in model.named_modules() if is_nf4(pair[1])]
    wrong = sorted(key for key, *_ in loading["mismatched_keys"])
    for key, linear in packed:
        if tuple(linear.weight.quant_state.shape) != (linear.out_features, linear.in_features):
            wrong.append(f"{key}.weight")
    if wrong:
        raise InputRefused(f"base.model: '{name}': the size of {wrong[0]} is not the one its config.json gives")


def _refuse_not_finite(model: PreTrainedModel, name: str) -> None:
    """Refuse a number that a file holds and the dtype does not, as float16 does not hold 100,000."""
    for key, tensor in model.state_dict().items():
        if not is_finite(tensor):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputRefused(f"base.model: '{name}': a number of '{key}' is not finite in {kind}")


__all__ = [
    "base_config",
    "ends_alone",
    "known_shape",
    "load_base",
    "planning_config",
    "stored_weights",
    "write_generation",
]
