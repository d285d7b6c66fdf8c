"""Make the quick start: a tokenizer, a small LLaMA base model and instruction tasks, all from nothing but a seed.

What: writes `base/` (a byte-level BPE tokenizer and a LLaMA of a few megabytes that stock transformers loads) and
`data/` (one training file and one test file for each task) into the folder given.
Why: fine-tuning can then be tried at once, without a download and without a GPU. The base has read about the world the
tasks ask about, never the tasks themselves: it answers next to nothing before its adapters are trained.
How: `python scripts/make_quickstart.py --out recipes/quickstart`; about nine minutes on two cores. The same seed on the
same machine with the same libraries gives the same files. The corpus itself is in `scripts/quickstart_world.py`.
"""

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from math import cos, pi
from pathlib import Path
from random import Random
from typing import Any

import torch
from quickstart_world import TASKS, Row, documents, task_rows
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qd2mora.data.instruction import split

VOCABULARY = 1152
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
LENGTH = 128  # tokens of a training row; the model takes up to POSITIONS
POSITIONS = 256
BATCH = 32
PEAK_RATE = 3e-3
WARM_UP = 100


# --- tasks ------------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_tasks(folder: Path, seed: int, train: int, test: int) -> list[Row]:
    """Write the two files of each task and return the training rows of all."""
    written: list[Row] = []
    for name in TASKS:
        train_rows, test_rows = task_rows(name, seed, train, test)
        write_rows(folder / f"{name}.jsonl", train_rows)
        write_rows(folder / f"{name}.test.jsonl", test_rows)
        written += train_rows
    return written


# --- tokenizer --------------------------------------------------------------------------------------------------------


def template_parts() -> list[str]:
    """Return the fixed parts of the two instruction prompts, without the space that goes to the word after them."""
    both = split({"instruction": "\0", "input": "\0", "output": ""})[0].split("\0")
    alone = split({"instruction": "\0", "output": ""})[0].split("\0")
    return [both[0][:-1], both[1][:-1], both[2], alone[0][:-1]]


def new_tokenizer() -> Tokenizer:
    """Return an untrained byte-level BPE in the manner of LLaMA: text is read as if a space stood before it."""
    tokenizer = Tokenizer(models.BPE(unk_token=PAD))
    # A fixed part of the prompt is one word to the BPE, so that it can become one piece.
    fixed = [f" ?{part.lstrip()}" for part in template_parts()[::3]] + template_parts()[1:3]
    words = [r" ?\p{L}+", r" ?\p{N}{1,2}", r" ?[^\s\p{L}\p{N}]+", r"\s+(?!\S)", r"\s+"]
    pattern = "|".join([part.replace(".", r"\.") for part in fixed] + words)
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def learned_tokenizer(texts: Iterable[str], vocabulary: int, positions: int) -> PreTrainedTokenizerFast:
    """Learn so many pieces from texts, for a model of so many positions."""
    tokenizer = new_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[begin]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=PAD,
        pad_token=PAD,
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )


def train_tokenizer(corpus: list[str], rows: list[Row]) -> PreTrainedTokenizerFast:
    """Learn the pieces from the corpus, the tasks and their prompts."""
    prompts = [text for row in rows for text in split(row)]
    return learned_tokenizer(chain(corpus, prompts), VOCABULARY, POSITIONS)


# --- base model -------------------------------------------------------------------------------------------------------


def untrained(tokenizer: PreTrainedTokenizerFast, seed: int, **widths: Any) -> LlamaForCausalLM:
    """Return a LLaMA of a tokenizer and of what `widths` says; a seed gives the same weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **widths,
    )
    return LlamaForCausalLM(config)


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return an untrained LLaMA; every width is a multiple of 64, the block of 4-bit quantisation."""
    return untrained(
        tokenizer,
        seed,
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )


def packed_rows(tokenizer: PreTrainedTokenizerFast, rng: Random) -> Iterator[list[int]]:
    """Yield rows of LENGTH tokens: whole documents, each between its begin and end token; the last is cut off."""
    source = documents(rng)
    row: list[int] = []
    while True:
        for ids in tokenizer(list(islice(source, 1000)))["input_ids"]:
            row += [*ids, tokenizer.eos_token_id]
            if len(row) >= LENGTH:
                yield row[:LENGTH]
                row = []


def batches(tokenizer: PreTrainedTokenizerFast, rng: Random) -> Iterator[Tensor]:
    """Yield (BATCH, LENGTH) int64 without end."""
    rows = packed_rows(tokenizer, rng)
    while True:
        yield torch.tensor(list(islice(rows, BATCH)))


def optimizer_of(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """Return AdamW that decays the matrices of the layers alone: a piece that is not met keeps its embedding."""
    named = list(model.named_parameters())
    decayed = [weight for name, weight in named if weight.ndim == 2 and ".layers." in name]
    kept = [weight for name, weight in named if weight.ndim == 1 or ".layers." not in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)


def rate_at(step: int, steps: int) -> float:
    """Return the share of the peak learning rate: a linear rise, then half a cosine."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.5 * (1 + cos(pi * (step - WARM_UP) / max(1, steps - WARM_UP)))


def train_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> None:
    """Train on the corpus for language modelling."""
    source = batches(tokenizer, Random(f"corpus {seed}"))
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps))
    start = time.perf_counter()
    for step in range(steps):
        ids_BT = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.3f} {time.perf_counter() - start:.0f} s", flush=True)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, count: int = 20) -> float:
    """Return the mean loss a token on documents drawn apart from those trained on."""
    source = batches(tokenizer, Random(f"held out {seed}"))
    losses = [model(input_ids=ids_BT, labels=ids_BT).loss.item() for ids_BT in islice(source, count)]
    return sum(losses) / len(losses)


# --- program ----------------------------------------------------------------------------------------------------------


def make(out: Path, seed: int, steps: int, train: int, test: int) -> None:
    """Write the whole quick start into `out`."""
    rows = write_tasks(out / "data", seed, train, test)
    tokenizer = train_tokenizer(list(islice(documents(Random(f"pieces {seed}")), 10_000)), rows)
    model = new_model(tokenizer, seed)
    train_base(model, tokenizer, seed, steps)
    print(f"held-out loss {held_out_loss(model, tokenizer, seed):.4f}")
    model.to(torch.float16).save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")


def main() -> None:
    """Read the command line and make the quick start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("recipes/quickstart"), help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1350, help="training steps of the base model")
    parser.add_argument("--train-rows", type=int, default=700, help="training rows a task")
    parser.add_argument("--test-rows", type=int, default=100, help="test rows a task")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    make(given.out, given.seed, given.steps, given.train_rows, given.test_rows)


if __name__ == "__main__":
    main()
