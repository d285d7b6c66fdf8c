"""A tiny real LLaMA, its tokenizer and a few small tasks, made on the spot for tests that need a whole run."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qd2mora.data.instruction import split

SPANNED = ["data.spans=[one,two,three]", "adapter.down.experts=3", "adapter.up.experts=3"]
SPANNED += [f"data.tasks.{task}.format=completion" for task in (0, 1)]
SPANNED += [f"data.tasks.{task}.fields={{prompt: instruction, completion: output}}" for task in (0, 1)]
"""What makes a recipe over both tasks, saved `with_more`, one whose answers are marked as spans."""
WORDS = ["red", "blue", "green", "sun", "moon", "star", "cat", "dog", "bird", "one", "two", "three"]


def rows_of(task: str, number: int) -> list[dict[str, str]]:
    """Return instruction rows whose answers a small adapter can learn: the first word, or the last."""
    rows = []
    for index in range(number):
        words = [WORDS[(index * step + step) % len(WORDS)] for step in (1, 5, 7)]
        answer = words[0] if task == "first" else words[-1]
        rows.append({"instruction": f"Say the {task} word.", "input": " ".join(words), "output": answer})
    return rows


def save_tokenizer(folder: Path) -> None:
    """Train and save a byte-level BPE tokenizer that knows the template and the words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["".join(split(row)) for task in ("first", "last") for row in rows_of(task, 40)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def save_base(folder: Path, *, tied: bool = True, seed: int = 0, hidden: int = 64, layers: int = 2) -> Path:
    """Save a random LLaMA (GQA, odd intermediate size) with its tokenizer; return the folder."""
    save_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=172,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=3,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_tasks(folder: Path, number: int = 40, *, with_more: bool = False) -> None:
    """Save `first.jsonl` and `last.jsonl`; `with_more` gives each row a vector of three numbers, `who`, and `spans`."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in ("first", "last"):
        rows: list[dict[str, object]] = [dict(row) for row in rows_of(task, number)]
        if with_more:
            rows = [row | {"who": [float(place % 3 == entry) for entry in range(3)]} for place, row in enumerate(rows)]
            spans = [[{"field": "output", "adapter": name}] for name in ("one", "two", "three")]
            rows = [row | {"spans": spans[place % 3]} for place, row in enumerate(rows)]
        lines = [json.dumps(row) for row in rows]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def recipe_text(base: Path, data: Path, output: Path, *, method: str = "d2mora", train: str = "") -> str:
    """Return a recipe over both tasks; `train` adds keys to its train section, as flow YAML."""
    return f"""
base: {{model: {base}}}
adapter: {{method: {method}, rank: 4, alpha: 8, targets: [q_proj, v_proj, down_proj]}}
data:
  tasks:
    - {{name: first, path: {data / "first.jsonl"}, validation: 8}}
    - {{name: last, path: {data / "last.jsonl"}, validation: 8}}
  max_length: 128
train: {{steps: 6, micro_batch: 2, global_batch: 4, learning_rate: 5e-3, save_every: 2, eval_every: 3{train}}}
output: {output}
"""
