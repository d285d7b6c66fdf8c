"""A base's tokenizer, with a pad token that is never mistaken for the end of a text."""

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qd2mora.base.files import RANDOM, UNLOADABLE, first_line, folder_of, is_gguf
from qd2mora.base.gguf_base import gguf_tokenizer
from qd2mora.disk.durable import save_pretrained, write_file
from qd2mora.disk.untrusted import check_tokenizer
from qd2mora.errors import InputRefused

_TOKENIZER_PATTERNS = ["*token*.json", "tokenizer.model", "*config.json", "vocab.*", "merges.txt", "*.jinja"]

PROBE = f"{'a' * 60} {'1' * 60}{' ' * 60}\n\t" + "The quick brown fox. " * 4
"""Tokenised once, so that a pattern that gives up does so before rows are read."""
_PANIC = "PanicException"


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer with a pad token that is never mistaken for the end of a text.

    Where none is declared: the unknown token, else an existing reserved token, else the end token; padding is masked
    by position in any case, so that a real end token in a row keeps its label. Raises InputRefused.
    """
    if model.startswith(RANDOM):
        raise InputRefused(f"base.model: '{model}' has random weights and no tokenizer; it can be planned and timed")
    try:
        tokenizer = gguf_tokenizer(model) if is_gguf(model) else _of_folder(model)
        whole, letter = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (PROBE, "a"))
        numbers = [tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id]
    except BaseException as error:
        # tokenizers raises a bare Exception for a file it cannot read, and a panic of its patterns is no Exception.
        is_known = isinstance(error, (*UNLOADABLE, RecursionError)) or type(error) is Exception
        if not is_known and type(error).__name__ != _PANIC:
            raise
        raise InputRefused(f"base.model: no tokenizer in '{model}': {first_line(error)}") from error
    if not whole or not letter or not all(number is None or isinstance(number, int) for number in numbers):
        raise InputRefused(
            f"base.model: the tokenizer of '{model}' makes no tokens of a text, or has no number for a token of its own"
        )
    if tokenizer.eos_token_id is None:
        raise InputRefused(f"base.model: the tokenizer of '{model}' has no end token; set eos_token in its config")
    if tokenizer.pad_token_id is None:
        known = tokenizer.get_vocab()
        names = ("<pad>", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>")
        reserved = [name for name in names if name in known]
        tokenizer.pad_token = reserved[0] if reserved else tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _of_folder(model: str) -> PreTrainedTokenizerBase:
    folder = folder_of(model, _TOKENIZER_PATTERNS, needs="tokenizer_config.json")
    check_tokenizer(folder)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files under a class that older loaders know. Raises OSError.

    transformers 5 calls a tokenizer of no class of its own `TokenizersBackend`, which 4.56 refuses; both read
    `PreTrainedTokenizerFast` as the same.
    """
    save_pretrained(tokenizer, folder)
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_file(path, [(json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()])


__all__ = ["load_tokenizer", "save_tokenizer"]
