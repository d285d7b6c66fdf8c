"""The base as it was before quantisation, with the same adapter, to measure what an export on it would be worth."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn

from qd2mora.adapter_folder import load_adapter
from qd2mora.base import RANDOM, base_config, compute_dtype, is_nf4, load_base
from qd2mora.base.host_memory import available_bytes
from qd2mora.base.passes import device_of
from qd2mora.run_folder import OpenRun


@contextmanager
def on_original(opened: OpenRun, notes: dict[str, object]) -> Iterator[PeftModel | None]:
    """Yield the run's model on unquantised weights, on the same device; None, and a note why, where it cannot be."""
    why = why_not_original(opened)
    if why:
        notes["original_base"] = why
        yield None
        return
    base = opened.recipe.base.model_copy(update={"quantization": "none"})
    model = load_base(base, device_of(opened.model))
    # The base is another than the adapter's on purpose, which loading would refuse otherwise.
    yield load_adapter(model, base, opened.folder.adapter, ["base", "base.quantization"]).eval()


def why_not_original(opened: OpenRun) -> str:
    """Say why an export on the original weights is not measured; nothing where it is."""
    base = opened.recipe.base
    if base.quantization == "none":
        return "the adapter was trained on it"
    if base.model.startswith(RANDOM) or "quantization_config" in base_config(base).to_dict():
        return "only quantised weights are at hand"
    device = device_of(opened.model)
    # A fifth more than the weights for what a pass holds.
    needed = 1.2 * compute_dtype(base, device).itemsize * _entries(opened.model)
    there = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    return f"no room to measure it: needs {needed / 2**30:.1f} GiB" if needed > there else ""


def _entries(model: PeftModel) -> int:
    """Return how many weights the base has, those in 4 bits counted one by one."""
    packed = {id(each.weight) for each in model.modules() if is_nf4(each)}
    linears = [each for each in model.modules() if isinstance(each, nn.Linear) and id(each.weight) in packed]
    rest = sum(tensor.numel() for tensor in model.parameters() if id(tensor) not in packed)
    return rest + sum(each.in_features * each.out_features for each in linears)


__all__ = ["on_original", "why_not_original"]
