"""The exact export: the base's weights and the routed adapter in one folder, with the code that runs them beside.

The folder loads with AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True) where this package is not
installed. Its code files are those of `qd2mora/routed`, copied as they are; weights are safetensors alone.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qd2mora.base.device import FLOATS
from qd2mora.base.tokenizer import save_tokenizer
from qd2mora.disk.shards import write_shards
from qd2mora.disk.tensor_file import TensorToWrite, tensor_at_hand
from qd2mora.errors import InputRefused
from qd2mora.merging.base_weights import BaseWeights
from qd2mora.merging.hf_folder import config_of, write_config
from qd2mora.merging.rung import SHARD_BYTES, ExportForm, Rung, WriteFolder, Written
from qd2mora.merging.static_updates import Statics
from qd2mora.merging.updated_weights import updated_weights
from qd2mora.mixture import MixtureLinear, mixture_layers
from qd2mora.mixture.gating import given_logits
from qd2mora.routed import modeling_mixture
from qd2mora.routed.gate import TOKEN
from qd2mora.routed.modeling_mixture import LinearContent
from qd2mora.run_folder import OpenRun

_SAME_EVERYWHERE = ("task", "none", "task+x")
"""Inputs of gates whose scores, or a part of them, are the same for every token of what is exported."""
_STATIC = "--to hf or --to lora exports its best static update"


def refuse_unfit(model: PeftModel, source: BaseWeights, adapter_name: str = "default") -> None:
    """Refuse what the code file does not run, in one line that names the way out. Raises InputRefused."""
    if source.config.model_type not in modeling_mixture.CONFIGS:
        raise InputRefused(f"--to exact: the base is a {source.config.model_type}, which the code file does not run")
    if not mixture_layers(model):
        raise InputRefused("--to exact: this adapter depends on no token: --to hf is exact already")
    for name, layer in mixture_layers(model).items():
        config = layer.mixture_config[adapter_name]
        row, where = config.row, f"--to exact: {config.method}"
        if config.routers.depends_on != TOKEN:
            raise InputRefused(f"{where} depends on no token: --to hf and --to lora are exact already")
        if name == "lm_head":
            raise InputRefused(f"{where} changes the output matrix, which the code file does not run; {_STATIC}")
        if row.core == "kron":
            raise InputRefused(f"{where} has Kronecker cores, which the code file does not run; {_STATIC}")
        if config.routers.reads_spans:
            raise InputRefused(f"{where} acts in marked spans alone, which the code file is not told")
        if config.routers.reads_vector:
            raise InputRefused(f"{where} reads a vector of the row, which the code file is not told; {_STATIC}")


@dataclass(frozen=True)
class Routed:
    """A routed adapter as the code files know it: by linear, what it is, and its tensors on the CPU."""

    contents: dict[str, LinearContent]
    tensors: dict[str, dict[str, Tensor]]


def routed_parts(model: PeftModel, adapter_name: str = "default") -> Routed:
    """Return copies of what the code file needs; routers that read the task beside x are given the one told last."""
    layers = mixture_layers(model)
    tensors = {name: _tensors(layer, adapter_name) for name, layer in layers.items()}
    return Routed({name: _content(layer, adapter_name, tensors[name]) for name, layer in layers.items()}, tensors)


def write_exact(
    routed: Routed,
    source: BaseWeights,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: str = "float16",
    limit: int = SHARD_BYTES,
) -> Written:
    """Write the folder; `dtype` of the base's weights, or nf4: those trained on, bit for bit (needs bitsandbytes).

    The adapter stays float32. Raises InputRefused, NotFinite.
    """
    written = Written()
    entries = _packed(source) if dtype == "nf4" else updated_weights(source, {}, FLOATS[dtype], {})
    base = [_moved(each, routed) for each in entries]
    added = [
        tensor_at_hand(f"{name}.mixture.{key}", tensor)
        for name, found in routed.tensors.items()
        for key, tensor in found.items()
    ]
    written.files = write_shards(folder, base + added, limit)
    _write_code(source, folder, dtype, routed.contents)
    save_tokenizer(tokenizer, folder)
    return written


def _write_code(source: BaseWeights, folder: Path, dtype: str, contents: dict[str, LinearContent]) -> None:
    content = config_of(source, "float32" if dtype == "nf4" else dtype) | {
        "model_type": source.config.model_type + modeling_mixture.SUFFIX,
        "architectures": [modeling_mixture.classes_of(source.config.model_type)[1].__name__],
        "auto_map": modeling_mixture.auto_map(source.config.model_type),
        "mixture": contents,
    }
    if dtype == "nf4":
        content["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": source.base.double_quant,
            "bnb_4bit_compute_dtype": str(source.dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
        }
    write_config(content, folder)
    for name in modeling_mixture.FILES:
        shutil.copyfile(Path(modeling_mixture.__file__).with_name(name), folder / name)


def _moved(each: TensorToWrite, routed: Routed) -> TensorToWrite:
    """Rename a weight of an adapted linear: the wrapper holds the linear as `base_layer`."""
    for name in routed.contents:
        if each.name.startswith(f"{name}."):
            rest = each.name.removeprefix(f"{name}.")
            return TensorToWrite(f"{name}.base_layer.{rest}", each.dtype, each.shape, each.blocks)
    return each


def _packed(source: BaseWeights) -> list[TensorToWrite]:
    """Return the base's weights as they were trained on: NF4 with its quantisation state, the others in 16 bits."""
    if source.base.quantization != "nf4":
        raise InputRefused("--dtype nf4: the base was trained on in 16 bits; float16, bfloat16 or float32 will do")
    entries = []
    for each in updated_weights(source, {}, source.dtype, {}):
        if each.name not in source.quantized:
            entries.append(each)
            continue
        # The state's length is not known before; the weight itself is made again when its turn comes.
        packed, state = source.quantize(each.name)
        shape = (sum(len(block) for block in packed), 1)
        entries.append(TensorToWrite(each.name, torch.uint8, shape, _packed_blocks(source, each.name)))
        entries += [
            tensor_at_hand(f"{each.name}.{key}", value.cpu()) for key, value in state.as_dict(packed=True).items()
        ]
    return entries


def _packed_blocks(source: BaseWeights, name: str) -> Callable[[], Iterator[Tensor]]:
    return lambda: iter(source.quantize(name)[0])


def _content(layer: MixtureLinear, adapter_name: str, tensors: dict[str, Tensor]) -> LinearContent:
    """Return what the code files must know of one linear, as plain values."""
    spec = layer.mixture_spec[adapter_name]
    # `places` follows from the rest: `RankStep` makes it again.
    step = {key: value for key, value in asdict(spec.step).items() if key != "places"}
    gates = {role: asdict(replace(gate, dropout=0.0, guidance=0.0)) for role, gate in spec.step.gates}
    for fields in gates.values():
        del fields["dropout"], fields["guidance"]  # of training alone
        if fields["draws"] == 1:  # as exports from before it have it
            del fields["draws"]
    return {
        "step": step | {"gates": gates},
        "scaling": spec.scaling,
        "tensors": {key: list(tensor.shape) for key, tensor in tensors.items()},
        "block": spec.place.scope_key("block"),
        "owns_router": spec.place.owns_router,
        "is_of_whole_mlp": layer.mixes_whole_mlps(adapter_name),
    }


def _tensors(layer: MixtureLinear, adapter_name: str) -> dict[str, Tensor]:
    """Return the tensors of one linear by the code files' names."""
    spec, own = layer.mixture_spec[adapter_name], layer.tensors(adapter_name)
    found = {"down": layer.linear_rows(adapter_name), "up": layer.columns(adapter_name)}
    if "mixture_core" in own:
        found["core"] = own["mixture_core"]
    for role, gate in spec.step.gates:
        for what in ("router", "bias", "out", "select_bias"):
            name = f"mixture_{what}_{role}"
            if name in own and not (what == "router" and role in spec.step.places):
                found[f"{what}_{role}"] = own[name]
        if gate.input in _SAME_EVERYWHERE:
            # These scores read no token, so that any x shows them.
            x = torch.zeros(1, 1, layer.in_features, device=own["mixture_A"].device)
            given = given_logits(role, x, own, layer.routing, adapter_name, spec)
            found[f"given_{role}"] = given.reshape(-1, given.shape[-1])[0]
    return {name: tensor.detach().float().cpu().clone() for name, tensor in found.items()}


def _refuse_unfit(opened: OpenRun, weights: BaseWeights, form: ExportForm) -> None:
    refuse_unfit(opened.model, weights)


def _prepare(opened: OpenRun, weights: BaseWeights, statics: Statics, form: ExportForm) -> WriteFolder:
    routed, tokenizer = routed_parts(opened.model), opened.tokenizer
    return lambda folder: write_exact(routed, weights, tokenizer, folder, dtype=form.dtype, limit=form.limit)


RUNG = Rung(_prepare, ("float16", "bfloat16", "float32", "nf4"), _refuse_unfit, is_routed=True, has_shards=True)

__all__ = ["RUNG", "Routed", "refuse_unfit", "routed_parts", "write_exact"]
