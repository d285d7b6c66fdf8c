"""What does a training step of a real model cost, beside transformers' Trainer with PEFT's LoRA of the same size?

    python scripts/get_smollm2.py
    python scripts/bench_smollm2.py [--rows 8] [--repeats 10] [--threads 2] [--out FILE]

SmolLM2-135M-Instruct in NF4, float32 products, no recomputation, the quickstart's rows worded by the model's template.
Ours is what `qd2mora train` runs: lean layers, loss over labelled tokens, D2MoRA M2 N3 on all linears. Theirs is
`Trainer.training_step` on transformers' own model with PEFT's LoRA, its rank chosen for as many parameters. Both take
the same batches, one after the other, and an AdamW update each; processor time, median and quartiles. Peak memory is of
processes of their own (`--only ours|theirs`), which take a few steps each.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from bench_parts import context, ratio, report, round_robin, summary, time_columns
from get_smollm2 import get
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from qd2mora.base import load_base, load_tokenizer
from qd2mora.base.host_memory import most_resident_bytes
from qd2mora.data import collate, prepare
from qd2mora.memory.loss import RowLoss
from qd2mora.memory.techniques import Layout, prepare_base
from qd2mora.mixture import MixtureConfig, add_adapter
from qd2mora.recipe import Base, load_recipe

ROOT = Path(__file__).parent.parent
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Step = Callable[[dict[str, torch.Tensor]], float]


def batches(rows: int) -> list[dict[str, torch.Tensor]]:
    """Return collated batches of the recipe's rows, the same for both."""
    recipe = load_recipe(ROOT / "recipes" / "smollm2-135m.yaml")
    tokenizer = load_tokenizer(recipe.base.model)
    tasks = prepare(recipe.data, tokenizer, 0)
    mixed = [row for group in zip(*(task.train for task in tasks), strict=False) for row in group]
    cuts = [mixed[start : start + rows] for start in range(0, 12 * rows, rows)]
    return [collate(cut, tokenizer.pad_token_id) for cut in cuts]


def ours(model_file: Path) -> tuple[Step, int]:
    """Return a step of ours, and the number of trained parameters."""
    base = load_base(Base(model=str(model_file)))
    prepare_base(base, Layout(8, 0, torch.float32, on_gpu=False), torch.device("cpu"))
    config = MixtureConfig(
        method="d2mora", rank=8, alpha=16.0, down={"experts": 2}, up={"experts": 3}, target_modules=TARGETS
    )
    model = add_adapter(base, config, seed=0).train()
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    optimizer, loss_of = torch.optim.AdamW(trained, lr=1e-4), RowLoss(model)

    def step(batch: dict[str, torch.Tensor]) -> float:
        loss = loss_of(batch).sum() / (batch["labels"] != -100).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step, sum(tensor.numel() for tensor in trained)


def theirs(folder: Path, size: int) -> tuple[Step, int]:
    """Return a step of the Trainer's on PEFT's LoRA, and the number of trained parameters, next to `size`."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    plain = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
    for module in plain.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # its backward pass fails
    linears = [module for name, module in plain.named_modules() if name.rpartition(".")[2] in TARGETS]
    of_rank = sum(module.in_features + module.out_features for module in linears)
    lora = peft.LoraConfig(r=round(size / of_rank), target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(plain, lora).train()
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(out, use_cpu=True, report_to=[], per_device_train_batch_size=8)
        trainer = Trainer(model, arguments)
    trainer.current_gradient_accumulation_steps = 1  # set by its loop, which is not run
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(batch: dict[str, torch.Tensor]) -> float:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        loss = trainer.training_step(model, inputs)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step, sum(tensor.numel() for tensor in trained)


def peak_of(only: str, arguments: argparse.Namespace) -> int:
    """Return the peak resident bytes of a process that takes a few steps of one of them."""
    command = [sys.executable, __file__, "--only", only, "--rows", str(arguments.rows), "--model", str(arguments.model)]
    done = subprocess.run([*command, "--folder", str(arguments.folder)], check=True, capture_output=True, text=True)
    return int(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure, print a table, and one line of JSON last."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=get(ROOT / "recipes" / "smollm2"))
    parser.add_argument("--folder", type=Path, required=True, help="the same model as a Hugging Face folder")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["ours", "theirs"])
    parser.add_argument("--out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    given = batches(arguments.rows)
    if arguments.only is not None:
        step, _ = ours(arguments.model) if arguments.only == "ours" else theirs(arguments.folder, 6_433_200)
        for batch in given[:4]:
            step(batch)
        print(most_resident_bytes())
        return
    our_step, size = ours(arguments.model)
    their_step, their_size = theirs(arguments.folder, size)
    taken = dict.fromkeys(("ours", "theirs"), 0)

    def run(name: str, step: Step) -> Callable[[], float]:
        def once() -> float:
            taken[name] += 1
            return step(given[taken[name] % len(given)])

        return once

    runs: dict[str, Any] = {"ours": run("ours", our_step), "theirs": run("theirs", their_step)}
    times = round_robin(runs, torch.device("cpu"), arguments.repeats, time.process_time)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in given) / len(given)
    result = {
        **context(torch.device("cpu"), {key: str(value) for key, value in vars(arguments).items()}),
        "parameters": {"ours": size, "theirs": their_size},
        "tokens_a_step": round(tokens, 1),
        "seconds": summary(times),
        "ratios": {"theirs / ours": ratio(times, "theirs", "ours")},
        "peak_rss_bytes": {name: peak_of(name, arguments) for name in ("ours", "theirs")},
    }
    report(result, time_columns(summary(times), "theirs"), arguments.out)


if __name__ == "__main__":
    main()
