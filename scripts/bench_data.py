"""What does preparing data cost beside the tokenizers library alone, and what does packing waste?

    python scripts/bench_data.py COMMONSENSE [--rows 100000] [--out scripts/results/data-cpu.json]

COMMONSENSE is a folder of .json or .json.gz files of instruction rows. They are repeated, with their number in the
text, up to the rows asked for. "Alone" is the library's fastest call on finished texts in memory, prompt and answer as
one, all cores; "ours" begins with a file on disk and ends with rows ready to train: reading, checking, wording, two
texts a row, the arrow file and its hash. The tokenizer is a byte-level BPE of 8,000 pieces, trained on the rows first.
Prints a table, and as the last line JSON.
"""

import argparse
import gzip
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qd2mora.data import TaskMix, TaskRows, lines_together, prepare
from qd2mora.data.instruction import split
from qd2mora.data.pack import MULTIPLE
from qd2mora.recipe import Data, Task

MAX_LENGTH = 512
BATCHES = ((16, 1), (16, 4), (64, 4), (128, 8))
"""Rows of a step, lines of a micro batch."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commonsense", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--out", type=Path)
    wishes = parser.parse_args()
    rows = _rows(wishes.commonsense, wishes.rows)
    texts = ["".join(split(row)) for row in rows]
    tokenizer = _tokenizer(texts[:20_000])
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QD2MORA_CACHE"] = str(Path(folder) / "cache")
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        numbers = _times(path, texts, tokenizer, wishes.times)
        data = Data(tasks=[Task(name="all", path=str(path), limit=len(texts))], max_length=MAX_LENGTH)
        began = time.perf_counter()
        tasks = prepare(data, tokenizer, 0)
        numbers["from_cache_s"] = round(time.perf_counter() - began, 2)
        numbers["packing"] = _waste(data, tasks)
    numbers["load"] = round(os.getloadavg()[0], 1)  # of others too: they lengthen wall time, not processor time
    numbers |= {"rows": len(rows), "bytes": sum(map(len, texts)), "cores": len(os.sched_getaffinity(0))}
    numbers |= {name: version(name) for name in ("tokenizers", "transformers")} | {"machine": platform.machine()}
    print(f"{len(rows)} rows: tokenizers alone {numbers['alone_s']} s, ours {numbers['ours_s']} s", end=", ")
    print(f"{numbers['ratio']} times; processor time {numbers['cpu_ratio']} times", end=", ")
    print(f"from the cache {numbers['from_cache_s']} s")
    for each in numbers["packing"]:
        print(
            f"step of {each['rows']:3} rows, {each['lines']} lines at once: {each['padded']:.1%} padding without, "
            f"{each['packed']:.2%} with packing"
        )
    if wishes.out:
        wishes.out.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(numbers))


def _rows(folder: Path, wanted: int) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.json.gz")]):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        found += [
            {name: row.get(name, "") for name in ("instruction", "input", "output")} for row in json.loads(content)
        ]
    again = (wanted - 1) // len(found)
    repeated = [row | {"instruction": f"{row['instruction']} ({turn})"} for turn in range(again + 1) for row in found]
    return repeated[:wanted]


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=8000, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _times(path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast, times: int) -> dict[str, Any]:
    """Take turns, so that what else the machine does falls on both."""
    backend: Any = tokenizer.backend_tokenizer
    taken: dict[str, list[tuple[float, float]]] = {"alone": [], "ours": []}

    def ours() -> None:
        # Another limit is another key: nothing comes from the cache.
        task = Task(name="all", path=str(path), limit=len(texts) + len(taken["ours"]))
        prepare(Data(tasks=[task], max_length=MAX_LENGTH), tokenizer, 0)

    def alone() -> None:
        for start in range(0, len(texts), 2048):
            [found.ids for found in backend.encode_batch_fast(texts[start : start + 2048])]

    runs: list[tuple[str, Callable[[], None]]] = [("alone", alone), ("ours", ours)]
    for _ in range(times):
        for name, run in runs:
            began = time.perf_counter(), time.process_time()
            run()
            taken[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    numbers: dict[str, Any] = {}
    for name, found in taken.items():
        numbers[f"{name}_s"], numbers[f"{name}_cpu_s"] = (
            round(statistics.median(each), 2) for each in zip(*found, strict=True)
        )
    numbers["ratio"] = round(numbers["ours_s"] / numbers["alone_s"], 3)
    numbers["cpu_ratio"] = round(numbers["ours_cpu_s"] / numbers["alone_cpu_s"], 3)
    return numbers | {"all_s": {name: [round(wall, 2) for wall, _ in found] for name, found in taken.items()}}


def _waste(data: Data, tasks: list[TaskRows]) -> list[dict[str, Any]]:
    """Return the share of a step's positions that are padding, over 200 steps of each size."""
    mixture, lengths = TaskMix(data, tasks, 0), tasks[0].lengths
    found = []
    for rows, lines in BATCHES:
        shares = {}
        for name, capacity in (("padded", None), ("packed", MAX_LENGTH)):
            used = run = 0
            for step in range(min(200, len(lengths) // rows)):
                mine = [int(lengths[place]) for _, place in mixture.places(step * rows, rows)]
                for numbers, packs in lines_together(mine, lines, capacity):
                    rest = iter(numbers)
                    sizes = [sum(mine[next(rest)] for _ in range(count)) for count in packs or [1] * len(numbers)]
                    used += sum(sizes)
                    run += len(sizes) * -(-max(sizes) // MULTIPLE) * MULTIPLE
            shares[name] = round(1 - used / run, 5)
        found.append({"rows": rows, "lines": lines, **shares})
    return found


if __name__ == "__main__":
    main()
