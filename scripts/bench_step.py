"""What does a whole training step cost? A stack of decoder layers of true 7B shapes, in one process.

    python scripts/bench_step.py [--layers 4] [--tokens 1024] [--targets qkv|qkvud|all] [--device cuda] [--out FILE]

A step is forward and backward with every layer recomputed, and AdamW on the adapters. Compares, on the same random NF4
weights: the frozen base (gradient to the input alone), this project's D2MoRA (M3 N8 r8), PEFT's LoRA (r 64) with and
without its preparation for k-bit training (float32 norms, embeddings and residual), and the D2MoRA authors' loop over
experts, written anew. Last, the share of the orthogonality penalty: its time once a step beside the step's own.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import torch
from bench_parts import (
    REPEATS,
    ExpertLoop,
    context,
    peak_bytes,
    ratio,
    report,
    round_robin,
    size,
    summary,
    time_columns,
)
from torch import Tensor, nn

from qd2mora.base import SHAPES, is_nf4, random_base
from qd2mora.mixture import MixtureConfig, MixtureLinear, penalty_terms
from qd2mora.recipe import Base

TARGETS = {
    "qkv": ["q_proj", "k_proj", "v_proj"],
    "qkvud": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
LORA_RANK, PENALTY = 64, 1e-4


def twin(model: nn.Module) -> nn.Module:
    """Return a copy that shares the 4-bit weights alone."""
    shared = {id(module.weight): module.weight for module in model.modules() if is_nf4(module)}
    return copy.deepcopy(model, shared)


def contenders(model: nn.Module, targets: list[str]) -> dict[str, nn.Module]:
    """Adapt twins of one model; up experts are random, so that nothing is multiplied by zeros alone."""
    found: dict[str, nn.Module] = {"base": twin(model)}
    mixture = MixtureConfig(method="d2mora", rank=8, down={"experts": 3}, up={"experts": 8}, target_modules=targets)
    lora = peft.LoraConfig(r=LORA_RANK, target_modules=targets, init_lora_weights=False)
    ours = found["ours"] = peft.get_peft_model(twin(model), mixture)
    for layer in mixtures(ours).values():
        nn.init.normal_(layer.tensors("default")["mixture_B"], std=0.02)
    found["peft lora"] = peft.get_peft_model(twin(model), lora)
    prepared = peft.prepare_model_for_kbit_training(twin(model), use_gradient_checkpointing=False)
    found["peft lora, k-bit preparation"] = peft.get_peft_model(prepared, lora)
    loop = peft.get_peft_model(twin(model), mixture)
    for name, layer in mixtures(loop).items():
        parent, _, child = name.rpartition(".")
        setattr(loop.get_submodule(parent), child, ExpertLoop(layer))
    found["expert loop"] = loop
    return found


def mixtures(model: nn.Module) -> dict[str, MixtureLinear]:
    """Return the adapted linears by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MixtureLinear)}


def stepper(model: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Return a training step on embedded tokens (1, T, D)."""
    llama: Any = model.base_model.model if isinstance(model, peft.PeftModel) else model
    llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
    # The default of prepare_model_for_kbit_training makes the residual float32, embeddings first.
    is_wide = any(tensor.dtype is torch.float32 and "norm" in name for name, tensor in llama.named_parameters())

    def step() -> None:
        inputs = (x.float() if is_wide else x).detach().requires_grad_()
        y = llama(inputs_embeds=inputs, use_cache=False).last_hidden_state
        y.backward(dy.to(y.dtype))
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def penalty_step(model: nn.Module) -> Callable[[], None]:
    """Return what the loop does for the penalty once an optimiser step: value, and gradient to every expert."""

    def run() -> None:
        for _, value, banks in penalty_terms(model, "diversity_cos"):
            torch.autograd.grad(PENALTY * value, banks)

    return run


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-7b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--targets", choices=sorted(TARGETS), default="qkvud")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # The stack alone is timed; a small vocabulary keeps the embedding out of the way.
    shape = replace(SHAPES[options.shape], layers=options.layers, vocab=512)
    base = Base.model_validate({"model": f"random:{options.shape}", "compute_dtype": str(dtype).removeprefix("torch.")})
    whole: Any = random_base(shape, base, device)
    models = contenders(whole.model, TARGETS[options.targets])
    x = torch.randn(1, options.tokens, shape.hidden, device=device, dtype=dtype)
    dy = torch.randn_like(x)
    runs = {name: stepper(model.to(device), x, dy) for name, model in models.items()}
    times = round_robin(runs, device, options.repeats)
    times["penalty"] = round_robin({"penalty": penalty_step(models["ours"])}, device, options.repeats)["penalty"]
    peaks = {name: peak_bytes(run, device) for name, run in runs.items()}
    found = summary(times)
    columns = time_columns(found, "base") | {"peak MiB": {name: size(value, "MiB") for name, value in peaks.items()}}
    result = {
        "bench": "step",
        **context(device, vars(options)),
        "times": found,
        "peak_bytes": peaks,
        "ratios": {
            "ours_per_base": ratio(times, "ours", "base"),
            "ours_per_lora": ratio(times, "ours", "peft lora"),
            "ours_per_lora_kbit": ratio(times, "ours", "peft lora, k-bit preparation"),
            "loop_per_ours": ratio(times, "expert loop", "ours"),
            "penalty_per_step": ratio(times, "penalty", "ours"),
        },
    }
    report(result, columns, options.out)


if __name__ == "__main__":
    main()
