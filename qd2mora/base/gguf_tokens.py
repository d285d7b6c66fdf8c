"""Tokenizers as GGUF files hold them: llama.cpp's rules for cutting text, and a tokenizer made of a file's lists.

The rules are one table both ways: bases are read by it, exports written (`merging/gguf_vocab.py`). A rule that is not
here would cut text in another way without a word, so a file with another is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qd2mora.base.files import UNLOADABLE, first_line
from qd2mora.errors import InputRefused

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens, as llama.cpp numbers them."""

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"llama-bpe": _LLAMA_3, "qwen2": _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}"), "tekken": _TEKKEN}
"""Rules for cutting text that are one pattern, by llama.cpp's names; its `gpt-2` is GPT-2's own, `smollm` that with
each digit by itself. Tekken's is Mistral's: llama.cpp, whose patterns know no case beyond ASCII and no marks, puts
another near it."""
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT_2, r"\p{N}+", "[0-9][0-9][0-9]")
"""llama.cpp's rule for a file that names none, older than its names for rules: each pattern cuts what the last left."""
_SAME = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "dbrx": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "refact": "smollm",
    "starcoder": "smollm",
}
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")
"""Names with which a word that is a token is taken whole, whatever the merges say, and a first token put in front; with
`dbrx`, which cuts as they do, neither."""


def tokenizer_of(content: Mapping[str, Any], path: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a header holds. Raises InputRefused."""
    where = f"base.model: '{path}'"
    _check_vocabulary(content, f"{where}: its vocabulary")
    kind, pre = content.get("tokenizer.ggml.model"), str(content.get("tokenizer.ggml.pre") or "default")
    cut = _SAME.get(pre, pre)
    if kind == "llama":
        try:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        except UNLOADABLE as error:
            raise InputRefused(f"{where}: no tokenizer: {first_line(error)}") from error
    elif kind == "gpt2" and (cut in PATTERNS or cut in ("default", "gpt-2", "smollm")):
        tokenizer = _of_bytes(content, cut, takes_whole_words=pre in _WHOLE_WORDS)
    else:
        raise InputRefused(
            f"{where}: a tokenizer {str(kind)[:40]!r} that cuts text by {str(pre)[:40]!r} is not read; "
            "name the model's own folder"
        )
    template = content.get("tokenizer.chat_template")
    if template and not tokenizer.chat_template:
        tokenizer.chat_template = template
    return tokenizer


def _of_bytes(content: Mapping[str, Any], cut: str, *, takes_whole_words: bool) -> PreTrainedTokenizerBase:
    """Return a byte-level tokenizer of a file's lists.

    transformers' own (5.24) makes GPT-2's of them, which brings an end token of GPT-2's where a file has none.
    """
    tokens, kinds = content["tokenizer.ggml.tokens"], content.get("tokenizer.ggml.token_type", [])
    merges = [tuple(merge.split(" ")) for merge in content.get("tokenizer.ggml.merges", [])]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=takes_whole_words))
    backend.pre_tokenizer = _cutting(cut)
    backend.decoder = decoders.ByteLevel()
    # Qwen's own tokenizer composes letters before it cuts text, which no key of a file says.
    if cut == "qwen2":
        backend.normalizer = normalizers.NFC()
    special = [token for token, kind in zip(tokens, kinds, strict=False) if kind in (CONTROL, UNKNOWN)]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    plain = [token for token, kind in zip(tokens, kinds, strict=False) if kind == USER_DEFINED]
    backend.add_tokens([AddedToken(token, normalized=False) for token in plain])
    numbers = {name: content.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL}
    names = {name: tokens[number] for name, number in numbers.items() if number is not None}
    if content.get("tokenizer.ggml.add_bos_token", takes_whole_words) and "bos_token" in names:
        first = names["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first}:1 $B:1", special_tokens=[(first, vocabulary[first])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


_SPECIAL = (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding"))


def _cutting(cut: str) -> Any:
    patterns: tuple[str, ...] = (PATTERNS[cut],) if cut in PATTERNS else ()
    if cut == "default":
        patterns = _DEFAULT
    if patterns:
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    by_gpt_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if cut == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_gpt_2])
    return by_gpt_2


def _check_vocabulary(content: Mapping[str, Any], where: str) -> None:
    """Refuse a vocabulary that does not hold together: the tokenizers library says so by a bare Exception, or a panic.

    Raises InputRefused.
    """
    tokens = content.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise InputRefused(f"{where} is no list of texts")
    if len(set(tokens)) < len(tokens):
        raise InputRefused(f"{where} holds a token twice")
    for name in ("scores", "token_type"):
        numbers = content.get(f"tokenizer.ggml.{name}", [0] * len(tokens))
        if not isinstance(numbers, list) or len(numbers) != len(tokens) or isinstance(numbers[0], str):
            raise InputRefused(f"{where} has {name} of another length")
    for name in ("bos", "eos", "unknown", "padding", "eot", "eom"):
        number = content.get(f"tokenizer.ggml.{name}_token_id", 0)
        if type(number) is not int or not 0 <= number < len(tokens):
            raise InputRefused(f"{where} of {len(tokens)} tokens has no {name} token {str(number)[:40]}")
    if not isinstance(content.get("tokenizer.chat_template", ""), str):
        raise InputRefused(f"{where} has a chat template that is no text")
    _check_merges(content.get("tokenizer.ggml.merges", []), set(tokens), where)


def _check_merges(merges: object, known: set[str], where: str) -> None:
    if not isinstance(merges, list):
        raise InputRefused(f"{where} has merges that are no list")
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else []
        if len(parts) != 2 or parts[0] not in known or parts[1] not in known or "".join(parts) not in known:
            raise InputRefused(f"{where} has the merge {str(merge)[:80]!r}, which makes no token")


__all__ = [
    "BYTE",
    "CONTROL",
    "NORMAL",
    "PATTERNS",
    "UNKNOWN",
    "UNUSED",
    "USER_DEFINED",
    "tokenizer_of",
]
