"""Frozen linears in 4-bit: made, told apart, and dequantised one at a time."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from qd2mora.recipe import Base


def nf4_config(base: Base, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return how linears are quantised while they load; None where they are not."""
    if base.quantization == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=base.double_quant,
        # Packed bytes stay uint8, bitsandbytes' default: other storage dtypes look like numbers to an engine that
        # casts.
        bnb_4bit_compute_dtype=dtype,
    )


def nf4_linear(weight: Tensor, base: Base, dtype: torch.dtype) -> nn.Linear:
    """Return a 4-bit linear of a dense weight (d_out, d_in) on its device, without a bias, as loading makes them."""
    import bitsandbytes as bnb

    # On meta, and quantised by the move to the weight's device: at no time is there a second dense weight.
    linear = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    linear.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=base.double_quant, module=linear
    ).to(weight.device)
    return linear


def is_nf4(linear: nn.Module) -> bool:
    """Tell whether a linear holds 4-bit weights."""
    return hasattr(getattr(linear, "weight", None), "quant_state")


def dense_weight(linear: nn.Linear) -> Tensor:
    """Return a linear's weight as float32, (d_out, d_in), dequantised where it is 4-bit; a fresh tensor."""
    # A clone even where it is float32 already: callers add updates into it.
    if not is_nf4(linear):
        return linear.weight.detach().float().clone()
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = linear.weight
    return dequantize_4bit(weight.data, weight.quant_state).float()


def settled(model: PreTrainedModel) -> PreTrainedModel:
    """Freeze a model that was just built, in evaluation mode."""
    for module in model.modules():
        if is_nf4(module):
            # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a weight in place at its first forward in evaluation:
            # absmax is rounded to bfloat16, backward fails, and widths not divisible by 32 raise.
            linear: Any = module
            linear.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False).eval()


__all__ = ["dense_weight", "is_nf4", "nf4_config", "nf4_linear", "settled"]
