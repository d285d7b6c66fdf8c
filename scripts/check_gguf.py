"""Does a GGUF file of a real model say what the model says? Logits, greedy text and tokens against transformers.

The file is read by transformers' own GGUF reader, which knows nothing of how it was written here; llama.cpp itself is
not run. `python scripts/check_gguf.py FOLDER` with the folder of a LLaMA, for example one with a SentencePiece-like
tokenizer.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qd2mora.base import load_tokenizer
from qd2mora.merging.gguf_file import write_gguf
from qd2mora.merging.source import Source
from qd2mora.recipe import Base

TEXTS = ("Once upon a time there was a little girl", "zé 日", "two  spaces", "It's 1234.5!")


def compare(folder: str, dtype: str, where: Path, new_tokens: int) -> dict[str, Any]:
    """Write the model as GGUF and compare what is read back."""
    tokenizer = load_tokenizer(folder)
    written = write_gguf(
        Source(Base(model=folder, quantization="none")), tokenizer, {}, where, name="model", dtype=dtype
    )
    name = written.files[0].name
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    ours = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype="float32")
    reader = AutoTokenizer.from_pretrained(where, gguf_file=name)
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (ours, theirs)]
        texts = [
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
            )
            for model in (ours, theirs)
        ]
    return {
        "dtype": dtype,
        "bytes": written.num_bytes,
        "relative_difference_of_logits": float((logits[0] - logits[1]).norm() / logits[1].norm()),
        "same_greedy_text": texts[0].equal(texts[1]),
        "same_tokens": all(reader(text)["input_ids"] == tokenizer(text)["input_ids"] for text in TEXTS),
    }


def main() -> None:
    """Print one line a dtype and a JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--new-tokens", type=int, default=60)
    given = parser.parse_args()
    results = []
    for dtype in ("float16", "q8_0"):
        with tempfile.TemporaryDirectory() as where:
            results.append(compare(given.folder, dtype, Path(where), given.new_tokens))
        print(", ".join(f"{key} {value}" for key, value in results[-1].items()))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
