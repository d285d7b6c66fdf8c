"""Every row of the D2MoRA paper's Table 1 (AAAI 2026) as data, and the recipe of each.

What: two models, six methods, nine sizes; what the paper prints (parameters in millions, mean accuracy of the eight
commonsense tasks in percent), and what our configuration trains, which a test counts.
Why: `scripts/table1.py` trains, evaluates and prints them; `recipes/table1/` holds the recipes it writes.

Where the paper leaves a choice: it states alpha, epochs and the rest for D2MoRA M4 N3 r16 on LLaMA-2-7B alone, and
every row follows that; DoRA's 51.7 million are magnitudes on all seven linears, which ours has;
D2MoRA's 45.6 million are M4 N3, not M3 N4 (45,225,984) as LLaMA-7B's row says. Means alone stand here: scores by task
are in the paper's table, which no file of its repository has. `DIFFERENCES` says what else is not the authors' run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qd2mora.recipe import Recipe, parse_recipe
from qd2mora.recipe.yaml_file import dump_yaml

DIFFERENCES = """
# Not as the authors' code (github iLearn-Lab/AAAI26-D2MoRA):
#   base        4 bits; theirs is of 16 bits on two cards, in float16
#   rows        the files of the eight tasks; theirs is commonsense_170k.json, which is made of them
#   held out    250 rows of each task; theirs 2,000 of the pile. The best of both is kept at the end, ours by the mean
#               over tasks and without the penalty, theirs by the pile and with it
#   prompt      LLM-Adapters' own: between its parts stands a line of 16 spaces. Their code has empty lines there, and
#               asks with one space fewer after `request.` than it trains with
#   tokens      prompt and answer are tokenised apart, here in training and in asking; they train on both as one text,
#               where the answer's first word takes the space before it, and ask with a prompt that ends in that space
#   rest        alpha, epochs and rate are stated for D2MoRA M4 N3 r16 on LLaMA-2-7B alone; every row follows that
"""

MODELS = {"llama-7b": "huggyllama/llama-7b", "llama2-7b": "meta-llama/Llama-2-7b-hf"}
FILES = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")
NAMES = ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_e", "arc_c", "obqa")


@dataclass(frozen=True)
class TableRow:
    """One configuration; `published`: mean accuracy by model; `printed`: parameters in millions as the paper has it."""

    name: str
    method: str
    rank: int
    down: int
    up: int
    parameters: int
    printed: float
    published: dict[str, float]


def _means(llama: float, llama2: float) -> dict[str, float]:
    return {"llama-7b": llama, "llama2-7b": llama2}


ROWS = (
    TableRow("lora-r64", "lora", 64, 1, 1, 50_331_648, 50.3, _means(74.32, 76.02)),
    TableRow("dora-r64", "dora", 64, 1, 1, 51_691_520, 51.7, _means(75.44, 77.30)),
    TableRow("moslora-r64", "moslora", 64, 1, 1, 50_724_864, 50.7, _means(76.01, 78.11)),
    TableRow("moelora-e8-r8", "moelora", 8, 8, 8, 50_383_872, 50.4, _means(75.88, 78.07)),
    TableRow("moelora-e4-r16", "moelora", 16, 4, 4, 50_371_584, 50.4, _means(75.75, 77.99)),
    TableRow("hydralora-n8-r12", "hydralora", 12, 1, 8, 45_613_056, 45.6, _means(76.22, 78.46)),
    TableRow("hydralora-n6-r16", "hydralora", 16, 1, 6, 46_399_488, 46.4, _means(76.06, 78.24)),
    TableRow("d2mora-m3-n8-r8", "d2mora", 8, 3, 8, 35_788_800, 35.8, _means(76.83, 79.27)),
    TableRow("d2mora-m4-n3-r16", "d2mora", 16, 4, 3, 45_617_664, 45.6, _means(77.17, 79.48)),
)


def find_rows(names: list[str]) -> list[TableRow]:
    """Return the rows of these names, all where there are none. Raises KeyError."""
    by_name = {row.name: row for row in ROWS}
    return [by_name[name] for name in names] or list(ROWS)


def content_of(row: TableRow, model: str, base: str | None = None, data: Path = Path("dataset")) -> dict[str, Any]:
    """Return a row's recipe as plain data; `data` is the dataset folder of LLM-Adapters."""
    adapter: dict[str, Any] = {"method": row.method, "rank": row.rank}
    # MOELoRA divides alpha by the ranks of all experts together.
    adapter["alpha"] = 2 * row.rank * (row.down if row.method == "moelora" else 1)
    adapter |= {"dropout": 0.05, "targets": ["q_proj", "k_proj", "v_proj"]}
    if row.method == "d2mora":
        adapter |= {"dropout_per_expert": True, "penalty": 1e-4}
    if row.down > 1:
        adapter["down"] = {"experts": row.down}
    if row.up > 1:
        adapter["up"] = {"experts": row.up}
    tasks = [
        {"name": name, "path": str(data / file / "train.json"), "validation": 250}
        for name, file in zip(NAMES, FILES, strict=True)
    ]
    return {
        "base": {"model": base or MODELS[model], "quantization": "nf4"},
        "adapter": adapter,
        "data": {"tasks": tasks, "max_length": 256, "mask_prompt": False, "on_bad_row": "skip"},
        "train": {
            "epochs": 4,
            "global_batch": 16,
            "learning_rate": 3e-4,
            "warmup_steps": 100,
            "seed": 42,
            "save_every": 200,
            "eval_every": 200,
            "final": "best",
        },
        "output": f"runs/table1/{model}/{row.name}",
    }


def recipe_of(row: TableRow, model: str, base: str | None = None, data: Path = Path("dataset")) -> Recipe:
    """Return a row's recipe."""
    return parse_recipe(content_of(row, model, base, data), f"{model}/{row.name}")


def yaml_of(row: TableRow, model: str) -> str:
    """Return a row's recipe as the file in `recipes/table1/`."""
    head = f"# Table 1 of D2MoRA: {row.name} on {model}, {row.parameters:,} parameters; by scripts/table1.py --write\n"
    head += DIFFERENCES.lstrip()
    return head + dump_yaml(content_of(row, model))
