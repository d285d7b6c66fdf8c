"""What fits which card: the README's table, from the planner.

    python scripts/table_cards.py

Plans D2MoRA (M4 N3 r16 on q, k, v; 8-bit moments; rows of 512 tokens, 16 a step) for each shape and card, 1 GiB of the
card left to others. Planned from shapes, not measured.
"""

from qd2mora.base import SHAPES
from qd2mora.memory import Plan, plan
from qd2mora.memory.choosing import GIB
from qd2mora.recipe import parse_recipe

CARDS = (8, 12, 16, 24)
MODELS = ("llama2-7b", "llama3-8b", "llama2-13b")


def planned(shape: str, card: int) -> Plan:
    """Plan one cell."""
    content = {
        "base": {"model": f"random:{shape}"},
        "adapter": {"method": "d2mora"},
        "data": {"tasks": [{"name": "any", "path": "any.jsonl"}], "max_length": 512},
        "train": {"steps": 1, "global_batch": 16, "optimizer": "adamw_8bit"},
        "output": "runs/any",
    }
    return plan(parse_recipe(content), budget=(card - 1) * GIB)


def cell(shape: str, card: int) -> str:
    """Say peak, micro batch, how many layers are recomputed and whether they stream, or that it does not fit."""
    chosen = planned(shape, card)
    if not chosen.fits:
        return f"no ({chosen.peak_bytes / GIB:.1f} GiB)"
    number = chosen.layout.recomputed
    layers = f"{number} layer{'s' * (number > 1)} recomputed" if number else "kept"
    if chosen.layout.stream:
        layers += f", {SHAPES[shape].layers - chosen.layout.resident} layers streamed"
    return f"{chosen.peak_bytes / GIB:.1f} GiB, {chosen.micro_batch} row{'s' * (chosen.micro_batch > 1)}, {layers}"


def main() -> None:
    """Print the table as Markdown."""
    print("| | " + " | ".join(f"{card} GB card" for card in CARDS) + " |")
    print("| --- |" + " --- |" * len(CARDS))
    for shape in MODELS:
        print(f"| {shape} | " + " | ".join(cell(shape, card) for card in CARDS) + " |")


if __name__ == "__main__":
    main()
