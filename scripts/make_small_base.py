"""Make a small base model that can learn: a tokenizer and a LLaMA of six million parameters, trained on real text.

What: writes `base/` (a byte-level BPE tokenizer and a LLaMA that stock transformers loads) and `report.json` into the
folder given, and keeps two checkpoints in `checkpoints/` while it works.
Why: methods can only be compared by accuracy or loss on a base that knows something of the tasks' world; see
`scripts/small_base_texts.py` for what it reads.
How: `python scripts/make_small_base.py DATA --out FOLDER` (3,000 steps, about 25 minutes of one idle core; --steps 1000
about 9); the same command after a kill goes on where it stopped, with another seed or number of steps it is refused:
the learning rate follows from both. The same seed, machine and libraries give the same files. The base of
scripts/results/table1_small*.json was not made that way but with 1,500 steps of a run of 3,000 and 400 more of one of
1,900 (`base.note` there), before that was refused: one command does not give those weights again.
"""

import argparse
import json
import time
from itertools import chain
from pathlib import Path
from random import Random

import numpy as np
import torch
from make_quickstart import learned_tokenizer, optimizer_of, untrained
from numpy.typing import NDArray
from small_base_texts import documents
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from qd2mora.data.instruction import split
from qd2mora.disk.durable import write_json
from qd2mora.training import checkpoint
from qd2mora.training.progress import Progress, State
from qd2mora.training.updates import PlainUpdater

VOCABULARY = 4096
POSITIONS = 512
LENGTH = 256  # tokens of a training row
BATCH = 8
PEAK_RATE = 2e-3
WARM_UP = 200
HELD_OUT = 64  # rows
SAVE_EVERY = 500


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Learn the pieces from the texts and the instruction prompt."""
    # The prompts' fixed parts are met a thousand times, so that each becomes a few pieces.
    prompts = chain.from_iterable(split({"instruction": "it", "output": "the correct answer is"}) for _ in range(1000))
    return learned_tokenizer(chain(texts, prompts), VOCABULARY, POSITIONS)


def packed(texts: list[str], tokenizer: PreTrainedTokenizerFast, seed: int) -> NDArray[np.int32]:
    """Return (rows, LENGTH): all texts in an order of the seed, each between its begin and end token."""
    shuffled = list(texts)
    Random(seed).shuffle(shuffled)
    stream: list[int] = []
    for ids in tokenizer(shuffled)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    rows = len(stream) // LENGTH
    return np.asarray(stream[: rows * LENGTH], dtype=np.int32).reshape(rows, LENGTH)


def batch_of(rows: NDArray[np.int32], step: int, seed: int) -> Tensor:
    """Return the rows of one step, (BATCH, LENGTH) int64: a function of step and seed."""
    epoch, place = divmod(step, len(rows) // BATCH)
    order = np.random.default_rng([seed, epoch]).permutation(len(rows))
    return torch.from_numpy(rows[order[place * BATCH : (place + 1) * BATCH]].astype(np.int64))


def rate_at(step: int, steps: int) -> float:
    """Return the learning rate: a linear rise, then a straight line down to a twentieth."""
    left = 1 - 0.95 * (step - WARM_UP) / max(1, steps - WARM_UP)
    return PEAK_RATE * min((step + 1) / WARM_UP, left)


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return an untrained LLaMA; every width is a multiple of 64, the block of 4-bit quantisation."""
    return untrained(
        tokenizer,
        seed,
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )


def train_base(model: LlamaForCausalLM, rows: NDArray[np.int32], folder: Path, seed: int, steps: int) -> int:
    """Train for language modelling, from the newest whole checkpoint on; return the tokens read in all."""
    optimizer = optimizer_of(model)
    source = PlainUpdater(dict(model.named_parameters()), optimizer)
    progress = Progress()
    folder.mkdir(parents=True, exist_ok=True)
    state, _ = checkpoint.newest(folder, *source.expected()) if checkpoint.steps_on_disk(folder) else (None, [])
    if state is not None:
        source.restore(state)
        progress = state.progress
    start, first = time.perf_counter(), progress.step
    while progress.step < steps:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(progress.step, steps)
        ids_BT = batch_of(rows, progress.step, seed)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.step, progress.applied = progress.step + 1, progress.applied + 1
        if progress.step % 100 == 0:
            speed = (progress.step - first) * BATCH * LENGTH / (time.perf_counter() - start)
            print(f"step {progress.step}/{steps} loss {loss.item():.3f} {speed:,.0f} tokens/s", flush=True)
        if progress.step % SAVE_EVERY == 0 or progress.step == steps:
            checkpoint.save(folder, State(*source.collect(copied=False), progress), keep=2)
    return progress.step * BATCH * LENGTH


@torch.no_grad()
def loss_of(model: LlamaForCausalLM, rows: NDArray[np.int32]) -> float:
    """Return the mean loss a token, in nats."""
    parts = torch.from_numpy(rows.astype(np.int64)).split(BATCH)
    return sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in parts) / len(rows)


def refuse_other(out: Path, plan: dict[str, int]) -> None:
    """Note in `out` what is made there; end the program where it is something else."""
    file = out / "plan.json"
    if not file.is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_json(file, plan)
    elif (before := json.loads(file.read_text(encoding="utf-8"))) != plan:
        raise SystemExit(f"error: --out: '{out}' holds a base of {before}, not of {plan}; name another folder")


def make(data: Path, out: Path, seed: int, steps: int) -> None:
    """Write the base into `out`."""
    refuse_other(out, {"steps": steps, "seed": seed})
    texts = documents(data)
    tokenizer = train_tokenizer(texts)
    rows = packed(texts, tokenizer, seed)
    learned, held_out = rows[HELD_OUT:], rows[:HELD_OUT]
    model = new_model(tokenizer, seed)
    print(f"{len(texts):,} documents, {learned.size:,} tokens, {model.num_parameters():,} parameters", flush=True)
    tokens = train_base(model, learned, out / "checkpoints", seed, steps)
    model.to(torch.float16).save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    report = {
        "parameters": model.num_parameters(),
        "documents": len(texts),
        "tokens_of_the_texts": int(learned.size),
        "tokens_read": tokens,
        "steps": steps,
        "seed": seed,
        "held_out_loss": loss_of(model.to(torch.float32), held_out),
        "characters_per_token": sum(map(len, texts)) / rows.size,
    }
    write_json(out / "report.json", report)
    print(json.dumps(report))


def main() -> None:
    """Read the command line and make the base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the real data: commonsense/, multitask_cot/, math/, text/")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into, or to go on in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    make(given.data, given.out, given.seed, given.steps)


if __name__ == "__main__":
    main()
