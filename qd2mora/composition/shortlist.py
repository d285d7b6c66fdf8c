"""Which adapters of a bank a router is fitted over at all: those whose descriptions are nearest to the prompts (MoVA).

MoVA (github TempleX98/MoVA) has a language model choose vision experts from their descriptions, before a fine gate.
Here texts are compared by the tokens they share, weighed by rarity among the prompts: cheap, and blind to words that
only mean the same.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qd2mora.data import Row
from qd2mora.errors import InputRefused
from qd2mora.recipe.yaml_file import read_mapping


def read_descriptions(path: Path, folders: Sequence[str]) -> dict[str, str]:
    """Read a YAML file of adapters and what each is for. Raises InputRefused where one has no description."""
    content, found = read_mapping(path, "--describe"), {}
    for folder in folders:
        text = content.get(folder)
        if not isinstance(text, str) or not text.strip():
            raise InputRefused(f"--describe: {path} has no description of '{folder}'; write '{folder}: what it is for'")
        found[folder] = text
    return found


def shortlisted(
    descriptions: Mapping[str, str], rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, keep: int
) -> list[str]:
    """Return the `keep` adapters whose descriptions share most with the prompts, in the order given."""
    # A space before it: in the middle of a prompt words have one.
    texts = [set(tokenizer(f" {text}", add_special_tokens=False)["input_ids"]) for text in descriptions.values()]
    prompts = [set(row.ids[: max(1, row.masked)].tolist()) for row in rows]
    counts = Counter(chain.from_iterable(prompts))
    # What every prompt has, such as the words of a template, says nothing.
    rarity = {token: math.log((1 + len(prompts)) / (1 + count)) for token, count in counts.items()}
    nearness = [
        sum(counts[token] * rarity[token] for token in text if token in counts) / math.sqrt(max(1, len(text)))
        for text in texts
    ]
    best = sorted(range(len(texts)), key=lambda place: -nearness[place])[:keep]
    return [folder for place, folder in enumerate(descriptions) if place in best]


__all__ = ["read_descriptions", "shortlisted"]
