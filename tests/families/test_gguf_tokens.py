"""Text cut by llama.cpp's named rules: cuts written down, and llama.cpp itself asked where it is installed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from qd2mora.base.gguf_tokens import CONTROL, NORMAL, tokenizer_of

ODD = [
    *("Hello, world!", "x=1+2;y<=3", "12345 1234 12 1", " 12345", "a1b22c333d4444", "1,234,567.89", "$100.50 +5% ^~|"),
    *("it's we'll I'M THEY'VE don't", "'S 'Re", "can't've", "'", " 's", "x'T", "  lead", "trail   ", "a  b   c"),
    *("line\nline\n\n\nend", "tab\tand\r\nreturn \n x", "ab   \n   cd", "\n \n", "a/b\n/c //\n", "\x85next \x1c\x1d"),
    *("!!! ??? ...", "(a)[b]{c}", "`code` ``", "<|a|>", "==>", " ==>  <=", " _x_ ", "http://x.y/z?a=1&b=2"),
    *("snake_case CamelCase HTTPServer", "naïve café école", "東京 2024年 ひらがな", "Привет МИР мир", "العربية ١٢٣"),
    *("½ ² Ⅷ ①", "10²", "\uff11\uff12\uff13\uff14", "👍👍🏽 👨\u200d👩\u200d👧", "a\u00a0b\u3000c\u2003 d"),
    *("\u200bzero\ufeff", "“quoted” — \u2018dash\u2019…", "§¶ © ™ €5", "İstanbul \u0131I \u017f'\u017f", "ǅ ǆ"),
]
OWN = {
    "qwen2": ["e\u0301clair cafe\u0301"],
    "deepseek-r1-qwen": ["e\u0301clair cafe\u0301"],
    "tekken": ["ÉCOLE", "हिन्दी भाषा", "e\u0301clair cafe\u0301"],
}
"""Where a rule is the model's own and llama.cpp's is near it: letters composed, case and marks beyond ASCII."""
EVERY = ["", "default", "gpt-2", "llama3", "llama-v3", "llama-bpe", "dbrx", "deepseek-r1-qwen", "qwen2", "refact"]
EVERY += ["starcoder", "smollm", "tekken"]


@pytest.fixture(scope="module")
def lists() -> dict[str, Any]:
    """A vocabulary whose tokens go across every cut, so that a cut in another place gives other tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(3 * [*ODD, *(text for texts in OWN.values() for text in texts)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {"tokens": tokens, "token_type": [CONTROL] * 2 + [NORMAL] * (len(tokens) - 2), "merges": merges}


def ours(lists: dict[str, Any], pre: str) -> Any:
    told = {f"tokenizer.ggml.{name}": value for name, value in lists.items()}
    told |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1}
    if pre:
        told["tokenizer.ggml.pre"] = pre
    return tokenizer_of(told, Path("model.gguf"))


DEFAULT = {
    " 12345": [" ", "123", "45"],
    "it's 4 x": ["it", "'", "s", " ", "4", " x"],
    "a ==>  b": ["a", " ", "==>", " ", " b"],
    "$100.50": ["$", "100", ".", "50"],
    "a, `b`": ["a", ",", " `", "b", "`"],
    "“é” ½": ["“", "é", "”", " ", "½"],
}


@pytest.mark.parametrize("pre", ["", "default"])
def test_a_file_that_names_no_rule_is_cut_by_llama_cpps_default_and_not_as_gpt_2(
    lists: dict[str, Any], pre: str
) -> None:
    backend = ours(lists, pre).backend_tokenizer
    for text, wanted in DEFAULT.items():
        found = [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]
        assert found == wanted


def test_a_rule_that_cuts_as_llama_3_brings_its_first_token_and_whole_words_only_under_its_names() -> None:
    # "ab" is a token that no merge makes.
    tokens = ["<s>", "</s>", "a", "b", "ab"]
    few = {"tokens": tokens, "token_type": [CONTROL] * 2 + [NORMAL] * 3, "merges": []}
    for pre, wanted in (("llama-bpe", [0, 4]), ("llama3", [0, 4]), ("llama-v3", [0, 4]), ("dbrx", [2, 3])):
        assert ours(few, pre)("ab")["input_ids"] == wanted


@pytest.mark.parametrize("pre", EVERY)
def test_llama_cpp_makes_the_same_tokens_of_odd_texts(lists: dict[str, Any], pre: str, tmp_path: Path) -> None:
    gguf, llama = pytest.importorskip("gguf"), pytest.importorskip("llama_cpp")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for size in ("context_length", "embedding_length", "block_count", "feed_forward_length", "head_count"):
        getattr(writer, f"add_{size}")(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(lists["tokens"])
    writer.add_token_types(lists["token_type"])
    writer.add_token_merges(lists["merges"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_tensor("token_embd.weight", np.zeros((len(lists["tokens"]), 8), dtype=np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    theirs, mine = llama.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False), ours(lists, pre)
    differing = [
        text for text in [*ODD, *OWN.get(pre, [])] if theirs.tokenize(text.encode()) != mine(text)["input_ids"]
    ]
    theirs.close()
    assert differing == OWN.get(pre, [])
