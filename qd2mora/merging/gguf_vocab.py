"""A tokenizer as llama.cpp keeps it, or a refusal: llama.cpp rebuilds tokenizers from a few kinds that it knows.

Two kinds are written: SentencePiece-like BPE over the text with its spaces marked (LLaMA 1 and 2), and byte-level BPE
whose rule for cutting text is one that llama.cpp has (GPT-2, LLaMA 3, Qwen 2). Anything else would load there and cut
text in another way without a word, so it is refused. Read from the tokenizer's own JSON, which is all there is to know.
"""

import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from qd2mora.base.gguf_tokens import BYTE, CONTROL, NORMAL, PATTERNS, UNKNOWN, UNUSED, USER_DEFINED
from qd2mora.errors import InputRefused

SPACE = "▁"
_WAYS = "--no-vocabulary writes a file for token ids alone, --to hf keeps the tokenizer"

_CUTS = {pattern: name for name, pattern in PATTERNS.items()}

TokenizerJson = dict[str, Any]
"""A tokenizer, or a part of one, as the tokenizers library writes it (0.22); its fields depend on its type."""


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp reads: `model` is llama (SentencePiece) or gpt2 (bytes), `cut` the name of the rule for cutting.

    tokens and kinds by id, up to the rows of the embedding; scores where the model is llama, merges where it is gpt2.
    """

    model: str
    cut: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None
    merges: list[str] | None
    adds_space: bool


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """Return the vocabulary of a tokenizer for an embedding of `rows`. Raises InputRefused."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)  # slow tokenizers have none
    if backend is None:
        raise InputRefused(f"--to gguf: the tokenizer has no tokenizer.json; {_WAYS}")
    content = json.loads(backend.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise InputRefused(f"--to gguf: a {model['type']} tokenizer is none that is written; {_WAYS}")
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    tokens, kinds = _tokens(content, rows)
    marks_spaces = _marks_spaces(content)
    if marks_spaces is not None:
        scores = _scores(tokens, kinds, merges)
        return Vocabulary("llama", "default", tokens, kinds, scores, None, marks_spaces)
    return Vocabulary("gpt2", _cut(content), tokens, kinds, None, merges, False)


def _tokens(content: TokenizerJson, rows: int) -> tuple[list[str], list[int]]:
    found: dict[int, tuple[str, int]] = {place: (token, NORMAL) for token, place in content["model"]["vocab"].items()}
    if content["model"].get("byte_fallback"):
        for place, (token, _) in list(found.items()):
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                found[place] = (token, BYTE)
    unknown = content["model"].get("unk_token")
    for each in content.get("added_tokens", []):
        kind = USER_DEFINED
        if each["content"] == unknown:
            kind = UNKNOWN
        elif each["special"]:
            kind = CONTROL
        found[each["id"]] = (each["content"], kind)
    if max(found) >= rows:
        raise InputRefused(f"--to gguf: the tokenizer has token {max(found)}, the embedding {rows} rows")
    # Embeddings are often padded to a round number of rows, for which llama.cpp wants tokens too.
    whole = [found.get(place, (f"[PAD{place}]", UNUSED)) for place in range(rows)]
    return [token for token, _ in whole], [kind for _, kind in whole]


def _scores(tokens: list[str], kinds: list[int], merges: list[str]) -> list[float]:
    """Return minus the rank of the merge that makes each token: SentencePiece's own order of joining."""
    rank: dict[str, int] = {}
    for place, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), place)
    last = float(len(merges))
    # Letters, which no merge makes, come last; what is no text (a control token, a byte) is never joined.
    ranks = [float(rank.get(token, last)) for token in tokens]
    return [-number if kind == NORMAL else 0.0 for number, kind in zip(ranks, kinds, strict=True)]


def _marks_spaces(content: TokenizerJson) -> bool | None:
    """Tell whether text gets a marked space in front; None where spaces are not marked at all."""
    normalizer, cutting = content.get("normalizer"), content.get("pre_tokenizer")
    steps = _steps(normalizer, "normalizers")
    marked = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    # Gemma cuts at spaces, of which none is left once they are marked.
    if cutting is not None and cutting["type"] == "Split" and cutting["pattern"] == {"String": " "} and marked in steps:
        cutting = None
    if cutting is None and marked in steps:
        others = [step for step in steps if step != marked]
        if others in ([], [{"type": "Prepend", "prepend": SPACE}]) and content["model"].get("byte_fallback"):
            return bool(others)
    elif cutting is not None and cutting["type"] == "Metaspace" and not steps and not cutting.get("split", True):
        return cutting.get("prepend_scheme", "always") != "never"
    return None


def _cut(content: TokenizerJson) -> str:
    """Return llama.cpp's name of a byte-level tokenizer's rule for cutting. Raises InputRefused."""
    steps = _steps(content.get("pre_tokenizer"), "pretokenizers")
    is_plain = not _steps(content.get("normalizer"), "normalizers") or content["normalizer"] == {"type": "NFC"}
    if is_plain and steps and steps[-1]["type"] == "ByteLevel" and not steps[-1]["add_prefix_space"]:
        if len(steps) == 1 and steps[0]["use_regex"]:
            return "gpt-2"
        if len(steps) == 2 and steps[0] == {"type": "Digits", "individual_digits": True} and steps[1]["use_regex"]:
            return "smollm"
        if len(steps) == 2 and steps[0]["type"] == "Split" and steps[0]["behavior"] == "Isolated":
            name = _CUTS.get(steps[0]["pattern"].get("Regex", ""))
            if name is not None:
                return name
    raise InputRefused(f"--to gguf: llama.cpp has no rule that cuts text as this tokenizer does; {_WAYS}")


def _steps(part: TokenizerJson | None, key: str) -> list[TokenizerJson]:
    if part is None:
        return []
    if part["type"] == "Sequence":
        return list(part[key])
    return [part]


__all__ = ["Vocabulary", "vocabulary_of"]
