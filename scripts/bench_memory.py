"""What does a training step take at its peak? Whole models of true shapes, by mode and by tokens.

    python scripts/bench_memory.py [--shapes llama2-7b ...] [--tokens 512 2048 ...] [--modes ...] [--out FILE]

Modes, all on NF4 with double quantisation, bfloat16 products, every layer recomputed, dropout 0.05:
  peft          HF + PEFT QLoRA as its documentation writes it: LoRA r 64 on all linears,
                prepare_model_for_kbit_training (float32 norms, embeddings, head and residual), autocast, the model's
                own loss, 32-bit AdamW
  peft qkvud    the same on the targets that ours has: q, k, v, up, down
  loop          D2MoRA M3 N8 r8 on q, k, v, up, down as the authors' loop over experts (bench_parts), 16-bit residual
  default       the same as this project runs it: 8-bit moments, loss in chunks of 1,024 tokens
  offload       and with layer inputs and embedding on the host, loss in chunks of 256
  streamed      and with the frozen layers on the host, two at a time on the device

Without CUDA the bytes are those of FakeTensors: the programs run on tensors that have a shape and no content, and each
storage is counted from the operation that makes it until it is freed. Nothing of that is a GPU's figure: not counted
are its context, its allocator's rounding and fragments, and what a kernel takes inside itself (bitsandbytes' product
dequantises there, PEFT's arms are the lower for it). The peak is that of a step's later micro batches, gradients being
there, or of the orthogonality penalty. Layers are alike, so two depths tell of all; --whole runs every layer.

With CUDA real steps are timed and measured, and then tried under caps of memory (set_per_process_memory_fraction).
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from bench_fake import Counted, empty_model, fill
from bench_parts import ExpertLoop, context
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import qd2mora.mixture.draws as draws
from qd2mora.base import SHAPES, Shape, random_base
from qd2mora.base.passes import CHUNK, last_states, output_head, token_losses
from qd2mora.memory.checkpointing import decoder_layers, recompute_layers
from qd2mora.memory.lean import make_lean
from qd2mora.memory.streaming import LayerStream
from qd2mora.memory.techniques import Layout, prepare_base
from qd2mora.mixture import MixtureConfig, MixtureLinear, add_adapter, penalty_terms, routing_of
from qd2mora.recipe import Base
from qd2mora.recipe.optimizers import OPTIMIZERS, OptimizerName

GIB = 1 << 30
TOKENS = (512, 2048, 8192, 16384)
CAPS_GIB = (4, 6, 8, 12, 16, 24)
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
DROPOUT, PENALTY = 0.05, 1e-4
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Mode:
    """How a step is done; `chunk` 0: the model's own loss."""

    adapter: str
    optimizer: OptimizerName = "adamw"
    chunk: int = 0
    offloads: bool = False
    streams: bool = False

    def setting(self, num_layers: int) -> Layout:
        """Return the planner's word for it."""
        return Layout(
            1, num_layers, torch.bfloat16, True, self.chunk, self.optimizer, self.offloads, self.offloads, self.streams
        )


MODES = {
    "peft": Mode("peft all-linear"),
    "peft qkvud": Mode("peft"),
    "loop": Mode("loop"),
    "default": Mode("mixture", "adamw_8bit", CHUNK),
    "offload": Mode("mixture", "adamw_8bit", 256, offloads=True),
    "streamed": Mode("mixture", "adamw_8bit", 256, offloads=True, streams=True),
}
TARGET_GIB = {"default": 6.0, "offload": 5.2, "streamed": 2.0}
TARGET_RATIO = {2048: 0.75, 8192: 0.70}


def adapted(model: Any, mode: Mode) -> nn.Module:
    """Give a base its adapter, as the mode's documentation does."""
    if mode.adapter.startswith("peft"):
        model.is_loaded_in_4bit = True  # what loading through transformers leaves
        model = peft.prepare_model_for_kbit_training(model)
        targets = "all-linear" if "all-linear" in mode.adapter else TARGETS
        lora = peft.LoraConfig(r=64, lora_alpha=16, lora_dropout=DROPOUT, target_modules=targets, task_type="CAUSAL_LM")
        return peft.get_peft_model(model, lora).train()
    mixture = MixtureConfig(
        method="d2mora", rank=8, dropout=DROPOUT, down={"experts": 3}, up={"experts": 8}, target_modules=TARGETS
    )
    found = add_adapter(model, mixture, seed=0)
    if mode.adapter == "loop":
        for name, layer in _mixtures(found).items():
            parent, _, child = name.rpartition(".")
            setattr(found.get_submodule(parent), child, ExpertLoop(layer, DROPOUT))
    return found.train()


def _mixtures(model: nn.Module) -> dict[str, MixtureLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MixtureLinear)}


def micro_batch(model: Any, mode: Mode, tokens: int, device: torch.device) -> Callable[[], None]:
    """Return the forward and backward pass of one row, every token labelled."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    if mode.chunk:
        routing: Any = routing_of(model)
        routing.rows, routing.lengths, routing.places = (1,), (tokens,), None
        # By position and not by a mask, whose number of ones nobody knows before it is looked at.
        labelled: Any = (torch.zeros(tokens - 1, dtype=torch.long, device=device), ids.new_zeros(tokens - 1))

        def ours() -> None:
            hidden = last_states(model, {"input_ids": ids})[:, :-1][labelled]
            losses = token_losses(hidden, ids[0, 1:], output_head(model), mode.chunk)
            del hidden
            (losses.sum() / tokens).backward()

        return ours

    def theirs() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=mode.adapter.startswith("peft")):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()

    return theirs


def penalty(model: Any) -> Callable[[], None]:
    """Return the penalty's gradient, once a step, as the loop adds it."""

    def run() -> None:
        for _, value, banks in penalty_terms(model, "diversity_cos"):
            torch.autograd.grad(PENALTY * value, banks)

    return run


def trained_of(model: nn.Module) -> list[nn.Parameter]:
    """Return what is trained."""
    return [tensor for tensor in model.parameters() if tensor.requires_grad]


def counted(shape: Shape, mode: Mode, lengths: list[int]) -> dict[str, Any]:
    """Return the bytes of FakeTensors: between micro batches, and beyond that at the peak by tokens."""
    model: Any = empty_model(shape)
    if not mode.adapter.startswith("peft"):
        recompute_layers(model, shape.layers, mode.offloads, CPU)
    if mode.adapter == "mixture":
        make_lean(model)
    model = adapted(model, mode)
    decoder = model.base_model.model.get_decoder()
    with FakeTensorMode(), Counted() as live:
        fill(model, decoder)
        for tensor in trained_of(model):
            tensor.grad = torch.zeros_like(tensor)
        sizes = tuple(tensor.numel() for tensor in trained_of(model))
        moments = torch.empty(OPTIMIZERS[mode.optimizer].state_bytes(sizes), dtype=torch.uint8)
        if mode.streams:
            stream = LayerStream(list(decoder_layers(decoder)), CPU)
            live.leave(stream.hosts)
        if mode.offloads:
            live.leave([decoder.embed_tokens.weight])
            layers: list[Any] = list(decoder_layers(decoder))
            for layer in layers:
                live.keep_out(layer._gradient_checkpointing_func.args[0])
        found: dict[str, Any] = {"between": live.now, "trained": sum(sizes), "moments": moments.nbytes}
        if mode.adapter == "mixture":
            found["penalty"] = live.beyond(penalty(model))
        for tokens in lengths:
            found[str(tokens)] = live.beyond(micro_batch(model, mode, tokens, CPU))
    return found


def all_layers(shape: Shape, mode: Mode, lengths: list[int], is_whole: bool) -> dict[str, Any]:
    """Return `counted` of every layer: as run, or in proportion from few, more than are in flight at once."""
    if is_whole:
        return counted(shape, mode, lengths)
    few = 3 if mode.offloads else 2
    less, more = (counted(replace(shape, layers=number), mode, lengths) for number in (few, few + 1))
    found = {name: more[name] + (shape.layers - few - 1) * (more[name] - less[name]) for name in more}
    # The penalty takes groups of layers.
    return found | ({"penalty": counted(shape, mode, [])["penalty"]} if "penalty" in found else {})


def fake_rows(options: argparse.Namespace, shape: str, name: str) -> list[dict[str, Any]]:
    """Return a row for each number of tokens."""
    draws._BLOCK.clear()  # random masks in the blocks of a GPU
    found = all_layers(SHAPES[shape], MODES[name], options.tokens, options.whole)
    rows = []
    for tokens in options.tokens:
        peak = found["between"] + max(found[str(tokens)], found.get("penalty", 0))
        row = {"shape": shape, "mode": name, "tokens": tokens, "peak_bytes": peak}
        rows.append({**row, "between_micro_batches_bytes": found["between"], "trained": found["trained"]})
    print(shape, name, {row["tokens"]: _gib(row["peak_bytes"]) for row in rows}, flush=True)
    return rows


def gpu_rows(options: argparse.Namespace, shape: str, name: str, device: torch.device) -> list[dict[str, Any]]:
    """Return the measured rows, and for each cap the longest row of a micro batch that still ran under it."""
    step = _real_step(SHAPES[shape], MODES[name], device)
    mode = {"shape": shape, "mode": name}
    rows = [{**mode, "tokens": tokens, **_measured(step, tokens, device)} for tokens in options.tokens]
    total = torch.cuda.get_device_properties(device).total_memory
    for cap in CAPS_GIB:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GIB / total), device)
        fitting = [tokens for tokens in options.tokens if "out_of_memory" not in _measured(step, tokens, device)]
        rows.append({**mode, "cap_gib": cap, "longest": max(fitting, default=0)})
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    del step
    torch.cuda.empty_cache()
    return rows


def _real_step(shape: Shape, mode: Mode, device: torch.device) -> Callable[[int], None]:
    """Build a real model; return a step of two micro batches and an update."""
    base = Base.model_validate({"model": "random:llama2-7b", "compute_dtype": "bfloat16"})
    model: Any = random_base(shape, base, torch.device("cpu") if mode.streams else device, dtype=torch.bfloat16)
    if mode.adapter == "mixture":
        prepare_base(model, mode.setting(shape.layers), device)
    elif mode.adapter == "loop":
        recompute_layers(model, shape.layers, False, device)
    model = adapted(model, mode).to(device) if mode.adapter == "loop" else adapted(model, mode)
    optimizer: Any
    if mode.optimizer == "adamw":
        optimizer = torch.optim.AdamW(trained_of(model), lr=1e-4, fused=True)
    else:
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(trained_of(model), lr=1e-4)

    def step(tokens: int) -> None:
        run = micro_batch(model, mode, tokens, device)
        run()
        run()
        if mode.adapter == "mixture":
            penalty(model)()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def safe(tokens: int) -> None:
        try:
            step(tokens)
        finally:
            optimizer.zero_grad(set_to_none=True)

    return safe


def _measured(step: Callable[[int], None], tokens: int, device: torch.device) -> dict[str, Any]:
    """Run four steps; return peaks and the median seconds of the last three."""
    torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    try:
        for _ in range(4):
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            step(tokens)
            ended.record()
            torch.cuda.synchronize(device)
            seconds.append(began.elapsed_time(ended) / 1e3)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"out_of_memory": True}
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "step_s": sorted(seconds[1:])[1],
    }


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return our default's peak over PEFT's, and over the loop's, where both were measured."""
    peaks = {(row["shape"], row["mode"], row["tokens"]): row["peak_bytes"] for row in rows if "peak_bytes" in row}
    return {
        f"{shape} {tokens} default/{other}": round(ours / peaks[shape, other, tokens], 4)
        for (shape, name, tokens), ours in peaks.items()
        for other in ("peft", "peft qkvud", "loop")
        if name == "default" and (shape, other, tokens) in peaks
    }


def goals(rows: list[dict[str, Any]], found: dict[str, float]) -> dict[str, bool]:
    """Return which limits for a 7B hold."""
    met = {
        f"7B 2048 {row['mode']} <= {TARGET_GIB[row['mode']]} GiB": row["peak_bytes"] <= TARGET_GIB[row["mode"]] * GIB
        for row in rows
        if row["shape"] == "llama2-7b"
        and row.get("tokens") == 2048
        and row["mode"] in TARGET_GIB
        and "peak_bytes" in row
    }
    for tokens, limit in TARGET_RATIO.items():
        key = f"llama2-7b {tokens} default/peft"
        if key in found:
            met[f"{key} <= {limit}"] = found[key] <= limit
    return met


def show(rows: list[dict[str, Any]], tokens: list[int]) -> None:
    """Print peaks in GiB, a line for each shape and mode."""
    table = Table("GiB at the peak", "mode", *(f"{number:,}" for number in tokens))
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "tokens" in row:
            cell = _gib(row["peak_bytes"]) if "peak_bytes" in row else "does not fit"
            lines.setdefault((row["shape"], row["mode"]), []).append(cell)
    for names, cells in lines.items():
        table.add_row(*names, *cells)
    Console(width=140).print(table)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def main() -> None:
    """Count or measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["llama2-7b", "llama3-8b", "llama2-13b"])
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--whole", action="store_true", help="every layer, not a few of them")
    parser.add_argument("--fake", action="store_true", help="FakeTensors also where there is CUDA")
    parser.add_argument("--out")
    options = parser.parse_args()
    is_real = torch.cuda.is_available() and not options.fake
    device = torch.device("cuda" if is_real else "cpu")
    rows: list[dict[str, Any]] = []
    for shape in options.shapes:
        for name in options.modes:
            rows += gpu_rows(options, shape, name, device) if is_real else fake_rows(options, shape, name)
            result = outcome(options, rows, is_real)
            if options.out:  # after every mode: a run of hours leaves what it has
                Path(options.out).parent.mkdir(parents=True, exist_ok=True)
                Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(rows, options.tokens)
    for key, value in (result["ratios"] | result["goals"]).items():
        print(f"{key}: {value}")
    print(json.dumps(result))


def outcome(options: argparse.Namespace, rows: list[dict[str, Any]], is_real: bool) -> dict[str, Any]:
    """Return what is written: the rows so far and what follows of them."""
    device = torch.device("cuda" if is_real else "cpu")
    found = ratios(rows)
    result = {
        "bench": "memory",
        "what": "measured on the device named" if is_real else "bytes of FakeTensors: counted, not measured on a GPU",
        **context(device, vars(options)),
        "rows": rows,
        "ratios": found,
        "goals": goals(rows, found),
    }
    if not is_real:
        result["device"] = "none: FakeTensors"
    return result


if __name__ == "__main__":
    main()
