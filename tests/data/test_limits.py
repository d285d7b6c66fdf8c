"""What a base cannot take is refused in one line; an answer goes on exactly where its prompt ends."""

import json
from pathlib import Path

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qd2mora.base import load_tokenizer
from qd2mora.data import Pair, encode, prepare
from qd2mora.data.limits import beyond, positions_of
from qd2mora.data.prepare import MAX_DROPPED
from qd2mora.data.tokenise import Tokeniser
from qd2mora.errors import InputRefused
from qd2mora.recipe import Data, Task, load_recipe
from qd2mora.training import train


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """LLaMA's kind: a space is put before each text, spaces are letters, decoding takes the first one away."""
    letters = ["<unk>", "<s>", "</s>", "▁", *"0123456789+=?.:\nabctwo", "tw", "two", "▁two", "▁t", "▁4", "▁▁"]
    merges = [("t", "w"), ("tw", "o"), ("▁", "two"), ("▁", "t"), ("▁", "4"), ("▁", "▁")]
    vocabulary = {letter: number for number, letter in enumerate(dict.fromkeys(letters))}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [("2+2=", " 4"), ("2+2=", "4"), ("2+2= ", "4"), ("a:\n", "two"), ("a:\n", "\n two"), ("", "two"), ("a", "  two")],
)
def test_prompt_and_completion_are_joined_as_they_are(
    prompt: str, answer: str, sentencepiece: PreTrainedTokenizerFast
) -> None:
    (row,) = encode([Pair(prompt, answer)], sentencepiece, 0, 99, True)
    assert sentencepiece.decode(row.ids[:-1]) == prompt + answer and row.ids[-1] == sentencepiece.eos_token_id
    (own,) = encode([Pair("a:\n", "two", starts_word=True)], sentencepiece, 0, 99, True)
    assert own.ids[own.masked :].tolist() == sentencepiece("two", add_special_tokens=False)["input_ids"] + [2]


def test_pieces_of_a_conversation_bring_no_spaces_of_their_own(sentencepiece: PreTrainedTokenizerFast) -> None:
    (talk,) = Tokeniser(sentencepiece).tokens([Pair("", "", segments=("a:\nt", "wo", "?", "two"))])
    assert sentencepiece.decode(talk.ids) == "a:\ntwo?two" and len(talk.bounds) == 3


def test_tokens_and_lengths_that_a_base_does_not_have_are_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "red " * 60, "completion": "sun"}), encoding="utf-8")
    tasks = prepare(Data(tasks=[Task(name="t", path=str(path), format="completion")]), tokenizer, 0)
    length = int(tasks[0].lengths.max())
    assert list(beyond(tasks, tokenizer, LlamaConfig(vocab_size=512, max_position_embeddings=length))) == []
    (line,) = beyond(tasks, tokenizer, LlamaConfig(vocab_size=512, max_position_embeddings=length - 1))
    assert f"1 rows of up to {length} tokens, the model is made for {length - 1}" in line
    (line,) = beyond(tasks, tokenizer, LlamaConfig(vocab_size=100, max_position_embeddings=512))
    assert "the embedding of base.model has 100 rows" in line


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "linear", "factor": 4.0}, 64),
        ({"rope_type": "dynamic", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
    ],
)
def test_scaled_positions_count(rope: dict[str, object], positions: int) -> None:
    assert (
        positions_of(LlamaConfig(max_position_embeddings=64, rope_parameters=rope | {"rope_theta": 1e4})) == positions
    )


@pytest.mark.parametrize(("changed", "words"), [({"vocab_size": 64}, "has 64 rows"), ({}, "made for 256")])
def test_a_run_of_such_rows_is_refused_before_its_folder_is_made(
    changed: dict[str, int], words: str, tmp_path: Path
) -> None:
    tiny.save_base(tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | changed), encoding="utf-8")
    tiny.save_tasks(tmp_path / "data")
    if not changed:
        row = {"instruction": "red " * 300, "output": "sun"}
        (tmp_path / "data/first.jsonl").write_text("\n".join([json.dumps(row)] * 20), encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny.recipe_text(tmp_path / "base", tmp_path / "data", tmp_path / "run"), encoding="utf-8")
    with pytest.raises(InputRefused, match=words):
        train(load_recipe(path, ["data.max_length=1024"]))
    assert not (tmp_path / "run/recipe.yaml").exists()


@pytest.mark.parametrize(("num_long", "is_refused"), [(5, False), (6, True)])
def test_rows_without_room_for_an_answer_are_left_out_up_to_the_share_that_is_documented(
    num_long: int, is_refused: bool, tmp_path: Path
) -> None:
    tiny.save_tokenizer(tmp_path)
    rows = [{"prompt": "red " * (40 if number < num_long else 1), "completion": "sun"} for number in range(100)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = Task(name="t", path=str(tmp_path / "rows.jsonl"), format="completion")
    data, tokenizer = Data(tasks=[task], max_length=16), load_tokenizer(str(tmp_path))
    if is_refused:
        with pytest.raises(InputRefused, match=r"6 of 100 rows, more than 5%, have no room"):
            prepare(data, tokenizer, 0)
    else:
        assert prepare(data, tokenizer, 0)[0].num_dropped == num_long
    for page in ("docs/data.md", "docs/recipe.md"):
        text = " ".join((Path(__file__).parents[2] / page).read_text(encoding="utf-8").split())
        assert f"ore than {MAX_DROPPED:.0%} of" in text, page
