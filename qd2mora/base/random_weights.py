"""A base of random weights in a named shape, for planning, benches and proofs: no files are read."""

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from qd2mora.base.device import compute_dtype
from qd2mora.base.nf4 import nf4_linear, settled
from qd2mora.base.shapes import Shape
from qd2mora.recipe import Base


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
            # N(0, 0.02) is transformers' own start of a LLaMA: NF4 then meets the numbers it was made for.
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
    return settled(model)


__all__ = ["random_base"]
