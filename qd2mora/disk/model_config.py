"""A model's and a tokenizer's configuration that others wrote: numbers within reach, before a library builds by them.

A library makes what a number asks for, a million layers too, and compares it with the weights afterwards. What no model
is, however large, is refused; whether the rest fits together is found where it is built.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from qd2mora.disk.file_content import JsonObject
from qd2mora.errors import InputRefused

MOST_ENTRIES = 4096
MOST_DEPTH = 16
MOST_TOKENS = 16_384
"""That are named one by one: each costs time when a tokenizer is made; models have up to 6,500."""
LONGEST_TOKEN = 1024
MOST_GROWTH = 64
"""Letters that normalising may make of one."""
MOST_SPOKEN = 4096
"""Letters that decoding may make of one: of answers, whose tokens are counted."""
_VOCABULARY = 1 << 21

# Twice to eight times what the largest open models have: Llama 3.1 405B is 126 layers of 16,384 with 128 heads, and
# vocabularies reach 262,144.
_SIZES: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("vocab_size",), (1, _VOCABULARY)),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), (1, 1 << 16)),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "n_inner", "ffn_dim"), (1, 1 << 20)),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), (1, 256)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head"), (1, 1024)),
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok"), (0, 1024)),
    **dict.fromkeys(("head_dim",), (1, 8192)),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "original_max_position_embeddings"), (1, 1 << 27)),
    **dict.fromkeys(("sliding_window",), (0, 1 << 31)),
    **dict.fromkeys(("num_labels",), (0, MOST_ENTRIES)),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), (-1, _VOCABULARY)),
}
_NUMBERS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), (1e-30, 1.0)),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), (1e-6, 1e15)),
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), (1e-6, 1e6)),
    **dict.fromkeys(("partial_rotary_factor",), (1e-6, 1.0)),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"), (0.0, 1.0)),
    **dict.fromkeys(("initializer_range",), (0.0, 1e6)),
}
# Whole numbers beyond it are no float64 any more: two readers may round them apart.
_REACH = float(1 << 53)
_LISTS_OF_IDS = ("eos_token_id",)
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_cache", "do_sample", "load_in_4bit", "load_in_8bit")
_SET_ASIDE = {"stop_strings": "ends of answers are the base's tokens and its template's signs"}


def check_model_config(content: JsonObject, path: Path) -> None:
    """Check every number of a model's configuration, however deep. Raises InputRefused."""
    for key, reason in _SET_ASIDE.items():
        if content.get(key):
            raise InputRefused(f"{path}: {key} is {str(content[key])[:80]!r}; {reason}")
    kinds = content.get("layer_types")
    if isinstance(kinds, list) and "sliding_attention" in kinds and content.get("sliding_window") is None:
        raise InputRefused(f"{path}: layer_types has 'sliding_attention', and there is no sliding_window")
    for key, value in _entries(content, path):
        _check_entry(key, value, path)


def _entries(
    node: object, path: Path, key: str = "", depth: int = 0, is_inside_list: bool = False
) -> Iterator[tuple[str, object]]:
    """Yield each value with the key it stands under; of a list that of the list."""
    if isinstance(node, dict | list):
        if depth > MOST_DEPTH or len(node) > MOST_ENTRIES:
            raise InputRefused(f"{path}: {key or 'it'} has {len(node)} entries, {depth} deep; that is no model's")
        pairs = node.items() if isinstance(node, dict) else ((key, each) for each in node)
        # Sizes are numbers; of tokens that end a text there may be a list, and no list of lists.
        if key in _SIZES and (key not in _LISTS_OF_IDS or is_inside_list):
            yield key, node
        for name, each in pairs:
            # A field may be left open, an entry of a list of tokens may not.
            is_open = each is None and isinstance(node, list) and key in _LISTS_OF_IDS
            yield from _entries("null" if is_open else each, path, name, depth + 1, isinstance(node, list))
    else:
        yield key, node


def _check_entry(key: str, value: object, path: Path) -> None:
    if value is None:
        return
    said = f"{path}: {key} is {str(value)[:80]!r}"
    if key in _SIZES:
        least, most = _SIZES[key]
        if type(value) is not int or not least <= value <= most:
            raise InputRefused(f"{said}; a whole number from {least} to {most} is needed")
    elif key in _NUMBERS:
        low, high = _NUMBERS[key]
        if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
            raise InputRefused(f"{said}; a number from {low:g} to {high:g} is needed")
    elif key in _FLAGS:
        if not isinstance(value, bool):
            raise InputRefused(f"{said}; true or false is needed")
    elif isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) <= _REACH:
        raise InputRefused(f"{said}; that is no number of a model's")


def check_tokens(content: JsonObject, path: Path) -> None:
    """Check the tokens that a tokenizer's configuration names. Raises InputRefused."""
    for key in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder", "added_tokens"):
        named = content.get(key)
        if isinstance(named, dict | list) and len(named) > MOST_TOKENS:
            raise InputRefused(f"{path}: {key} names {len(named)} tokens; {MOST_TOKENS} are the most that are read")
        for each in named if isinstance(named, list) else named.values() if isinstance(named, dict) else ():
            _check_token(each, path, key)
    numbers = content.get("added_tokens_decoder")
    if isinstance(numbers, dict) and not all(re.fullmatch(r"\d{1,7}", each) for each in numbers):
        raise InputRefused(f"{path}: added_tokens_decoder names tokens by something else than their numbers")


def _check_token(token: object, path: Path, key: str) -> None:
    text = token.get("content") if isinstance(token, dict) else token
    number = token.get("id", 0) if isinstance(token, dict) else 0
    if not isinstance(text, str) or len(text) > LONGEST_TOKEN or type(number) is not int or not 0 <= number < 1 << 31:
        raise InputRefused(f"{path}: {key}: {str(token)[:80]!r} is no token of at most {LONGEST_TOKEN} letters")


def check_tokenizer_parts(content: JsonObject, path: Path) -> None:
    """Check what a tokenizer.json does to a text before it is cut: no growth, no pattern without end.

    Raises InputRefused.
    """
    check_tokens(content, path)
    _check_growth(_parts(content.get("normalizer")) + _parts(content.get("pre_tokenizer")), MOST_GROWTH, path)
    _check_growth(_parts(content.get("decoder")), MOST_SPOKEN, path)


def _check_growth(parts: list[JsonObject], most: int, path: Path) -> None:
    # Each step may multiply what the one before it made.
    growth = 1
    for part in parts:
        for key in ("content", "prepend", "replacement"):
            text = part.get(key)
            growth *= max(1, len(text)) if isinstance(text, str) else 1
        if growth > most:
            raise InputRefused(f"{path}: its {part.get('type')} makes more than {most} letters of one")
        pattern = part.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        if isinstance(regex, str) and repeats_without_end(regex):
            raise InputRefused(f"{path}: the pattern {regex[:80]!r} repeats what repeats, and may be matched for ever")


def _parts(node: object, depth: int = 0) -> list[JsonObject]:
    """Return a step of a tokenizer and those inside it."""
    if not isinstance(node, dict) or depth > MOST_DEPTH:
        return []
    inside = [each for key in ("normalizers", "pretokenizers", "decoders") for each in _listed(node.get(key))]
    return [node, *(part for each in inside for part in _parts(each, depth + 1))]


def _listed(node: object) -> list[object]:
    return node[:MOST_ENTRIES] if isinstance(node, list) else []


_MEMBERS = re.compile(r"\[(?:\\.|[^\]\\])*\]")
_ESCAPES = re.compile(r"\\(?:[pP]\{[^}]*\}|.)", re.DOTALL)
_FIXED = re.compile(r"\{\d+\}")
_REPEATED = re.compile(r"[*+]|\{\d*,\d*\}")


def repeats_without_end(regex: str) -> bool:
    """Tell whether a repeated group holds a repetition or a choice: such patterns take exponential time.

    `(\\d{3})+` of a fixed count is no such group, and `(?:'s|'t)?` is not repeated.
    """
    # Innermost first: an escaped bracket opens no class, nor does a parenthesis in a class open a group; what signs are
    # left then are those that mean something.
    flat = _FIXED.sub("", _ESCAPES.sub("x", _MEMBERS.sub("x", _ESCAPES.sub("x", regex))))
    open_groups: list[bool] = []
    for place, letter in enumerate(flat):
        if letter == "(":
            open_groups.append(False)
        elif letter == ")" and open_groups:
            repeats = open_groups.pop()
            is_repeated = _REPEATED.match(flat, place + 1) is not None
            if repeats and is_repeated:
                return True
            if open_groups and (repeats or is_repeated):
                open_groups[-1] = True
        elif open_groups and (letter == "|" or _REPEATED.match(flat, place)):
            open_groups[-1] = True
    return False


__all__ = ["check_model_config", "check_tokenizer_parts", "check_tokens", "repeats_without_end"]
