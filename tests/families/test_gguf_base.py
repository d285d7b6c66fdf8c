"""A GGUF file as a base: every kind of number, every row, its tokenizer; and a header that lies gets one line."""

import random
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from family_models import save_family
from test_family_runs import recipe_of
from transformers import AutoModelForCausalLM

from qd2mora.base import fingerprint, load_base, load_tokenizer
from qd2mora.base.gguf_base import StoredBlocks, gguf_config, gguf_tensors
from qd2mora.base.gguf_forms import llama3_factors, llama3_rope
from qd2mora.cli import main
from qd2mora.disk import gguf_header
from qd2mora.disk.gguf_header import TensorPlace, read_header
from qd2mora.errors import DamagedFile, InputRefused
from qd2mora.merging import ExportOptions, merge
from qd2mora.recipe import Base, load_recipe
from qd2mora.training import train

gguf = pytest.importorskip("gguf")
KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a tiny LLaMA 3, and its export as one file with a vocabulary."""
    folder = tmp_path_factory.mktemp("gguf_base")
    save_family("llama3.2", folder / "base")
    tiny.save_tasks(folder / "data", 24)
    train(recipe_of(folder, "run"))
    merge(folder / "run", folder / "out", ExportOptions(to="gguf"))
    merge(folder / "run", folder / "hf")
    return folder


@pytest.fixture(scope="module")
def file(made: Path) -> Path:
    return next((made / "out").glob("*.gguf"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [None, 4])
def test_rows_of_every_kind_come_out_as_the_package_has_them(
    kind: str, heads: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qd2mora.base.gguf_base._READ_AT_ONCE", 1024)
    of = gguf.GGMLQuantizationType[kind]
    numbers, size = gguf.GGML_QUANT_SIZES[of]
    rows, width = 24, 512
    packed = np.random.default_rng(0).integers(0, 60, (rows, width // numbers * size), dtype=np.uint8)
    path = tmp_path / "numbers"
    path.write_bytes(b"before it" + packed.tobytes())
    stored = StoredBlocks(TensorPlace(path, (rows, width), int(of), 9, packed.nbytes), heads)
    wanted = torch.from_numpy(gguf.quants.dequantize(packed, of).reshape(rows, width).copy())
    if heads is not None:  # pairs to halves, the slow way
        wanted = torch.cat([torch.cat([head[0::2], head[1::2]]) for head in wanted.chunk(heads)])
    wanted = wanted.to(stored.dtype)
    assert torch.equal(stored.read(), wanted)
    for first, last in ((0, 1), (3, 17), (5, 6), (6, 12), (23, 24), (7, 7)):
        assert torch.equal(stored.read(first, last), wanted[first:last])


def test_a_file_says_the_model_and_the_tokenizer_it_was_made_of(made: Path, file: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(made / "hf", dtype=torch.float32)
    found, wanted = gguf_config(str(file)).to_dict(), plain.config.to_dict()
    for key in ("vocab_size", "hidden_size", "num_key_value_heads", "rms_norm_eps", "head_dim", "tie_word_embeddings"):
        assert found[key] == pytest.approx(wanted[key]), key
    assert found["rope_parameters"] == {key: wanted["rope_parameters"][key] for key in found["rope_parameters"]}
    base = load_base(Base(model=str(file), quantization="none"))
    assert base.generation_config.eos_token_id in (2, [2])
    ids = torch.arange(4, 44)[None]
    with torch.no_grad():
        torch.testing.assert_close(base(ids).logits, plain(ids).logits, rtol=1e-3, atol=1e-3)
    one, other = load_tokenizer(str(file)), load_tokenizer(str(made / "hf"))
    for text in ("Say the first word.", "red  blue\n\n1234 naïve 東京", " sun's"):
        ids_of = [tokenizer(text)["input_ids"] for tokenizer in (one, other)]
        assert ids_of[0] == ids_of[1] and one.decode(ids_of[0]) == other.decode(ids_of[1])
    assert (one.bos_token, one.eos_token, one.pad_token) == (other.bos_token, other.eos_token, other.pad_token)


def test_a_run_on_a_file_trains_resumes_and_leaves_in_every_form(made: Path, file: Path) -> None:
    text = (made / "run.yaml").read_text(encoding="utf-8").replace(str(made / "base"), str(file))
    path = made / "second.yaml"
    path.write_text(text.replace(str(made / "run"), str(made / "second")), encoding="utf-8")
    recipe = load_recipe(path)
    train(recipe)
    for to in ("hf", "lora", "exact", "gguf", "gguf_lora"):
        merge(made / "second", made / f"second-{to}", ExportOptions(to=to))
    AutoModelForCausalLM.from_pretrained(made / "second-hf")
    before = fingerprint(recipe.base)
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    changed = file.with_name("changed.gguf")
    changed.write_bytes(content)
    assert fingerprint(Base(model=str(changed))) != before


def test_the_scaling_of_a_llama_3_is_found_from_its_factors() -> None:
    for factor, length, theta in ((8.0, 8192, 5e5), (32.0, 8192, 5e5), (4.0, 2048, 1e4)):
        rope = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": length}
        assert llama3_rope(llama3_factors(rope, 128), theta, 128) == rope
    assert llama3_rope(torch.linspace(1, 3, 64), 5e5, 128) is None


def header(
    keys: dict[str, tuple[int, bytes]], tensors: list[bytes], *, magic: bytes = b"GGUF", version: int = 3
) -> bytes:
    text = magic + struct.pack("<IQQ", version, len(tensors), len(keys))
    for key, (kind, value) in keys.items():
        text += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value
    return text + b"".join(tensors)


def word(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def tensor(name: str, sizes: tuple[int, ...] = (4,), kind: int = 0, place: int = 0) -> bytes:
    return word(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, place)


LLAMA = {"general.architecture": (8, word("llama"))}
HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "goes on after"),
    "magic": (header({}, [], magic=b"GGML"), "is no GGUF file"),
    "version": (header({}, [], version=9), "version 9 is not read"),
    "big endian": (header({}, [], version=3 << 24), "is not read"),
    "tensors": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "is none that a model has"),
    "keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "is none that a model has"),
    "long key": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), "a text of"),
    "long list": (header({"a": (9, struct.pack("<IQ", 4, 1 << 61))}, []), "a list of"),
    "list beyond the file": (header({"a": (9, struct.pack("<IQ", 12, 3_000_000))}, []), "goes on after"),
    "nested lists": (header({"a": (9, struct.pack("<IQ", 9, 3))}, []), "a list of kind 9"),
    "unknown value": (header({"a": (77, b"")}, []), "a value of kind 77"),
    "no text": (header({"a": (8, struct.pack("<Q", 2) + b"\xff\xfe")}, []), "not UTF-8"),
    "path": (header(LLAMA, [tensor("../../etc/passwd")]), "is no name"),
    "axes": (header(LLAMA, [word("x") + struct.pack("<I", 1 << 30)]), "axes"),
    "sizes": (header(LLAMA, [tensor("x", (1 << 40, 1 << 40))]), "has the sizes"),
    "no size": (header(LLAMA, [tensor("x", (0,))]), "has the sizes"),
    "kind": (header(LLAMA, [tensor("x", kind=9999)]) + bytes(99), "of kind 9999"),
    "beyond": (header(LLAMA, [tensor("x", place=1 << 20)]), "cut short"),
    "not aligned": (header(LLAMA, [tensor("x", place=3)]) + bytes(99), "not aligned"),
    "overlap": (header(LLAMA, [tensor("x"), tensor("y")]) + bytes(99), "overlap"),
    "twice": (header(LLAMA, [tensor("x"), tensor("x", place=32)]) + bytes(199), "twice"),
    "alignment": (header(LLAMA | {"general.alignment": (4, struct.pack("<I", 0))}, []), "alignment"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_lies_gets_one_line(name: str, tmp_path: Path) -> None:
    content, words = HOSTILE[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises((InputRefused, DamagedFile), match=words) as caught:
        read_header(path)
    assert "\n" not in str(caught.value)


def test_a_header_with_any_byte_changed_is_read_or_refused_in_one_line(file: Path, tmp_path: Path) -> None:
    content, chance = file.read_bytes(), random.Random(0)
    start = min(place.start for place in read_header(file).tensors.values())
    path, refused = tmp_path / "changed.gguf", 0
    # The vocabulary is most of a header, and a changed letter of it is a word: its first 700 bytes hold the rest.
    places = [chance.randrange(start if number % 4 == 0 else 700) for number in range(150)]
    for place in places:
        changed = bytearray(content)
        changed[place] = chance.choice([0, 1, 127, 128, 255, changed[place] ^ 1 << chance.randrange(8)])
        path.write_bytes(changed)
        try:
            gguf_tensors(str(path))
            load_tokenizer(str(path))
        except (InputRefused, DamagedFile) as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000
    assert refused > 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"general.architecture": (8, word("mamba"))}, "of the architecture 'mamba'"),
        ({"general.type": (8, word("adapter"))}, "is a 'adapter' and not a model"),
        ({"llama.block_count": (4, struct.pack("<I", 0))}, "llama.block_count is 0"),
        ({"llama.rope.scaling.type": (8, word("yarn"))}, "position scaling 'yarn'"),
    ],
)
def test_a_model_that_is_not_read_is_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    sizes = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count")
    keys = {f"llama.{name}": (4, struct.pack("<I", 8)) for name in sizes}
    keys |= {"llama.attention.layer_norm_rms_epsilon": (6, struct.pack("<f", 1e-5))}
    path = tmp_path / "model.gguf"
    path.write_bytes(header(LLAMA | keys | change, [tensor("token_embd.weight", (8, 4))]) + bytes(999))
    with pytest.raises(InputRefused, match=words):
        load_base(Base(model=str(path)))


def test_a_part_that_is_missing_is_named_and_all_parts_are_read(file: Path, tmp_path: Path) -> None:
    one = tmp_path / "model-00001-of-00002.gguf"
    one.write_bytes(file.read_bytes())
    with pytest.raises(InputRefused, match=r"model-00002-of-00002\.gguf is not there"):
        load_base(Base(model=str(one)))
    with pytest.raises(InputRefused, match="no file"):
        load_base(Base(model=str(tmp_path / "none.gguf")))
    (tmp_path / "model-00002-of-00002.gguf").write_bytes(file.read_bytes())
    with pytest.raises(DamagedFile, match="stands in another part too"):
        load_base(Base(model=str(one)))
    (tmp_path / "model-00002-of-00002.gguf").write_bytes(header({}, [tensor("blk.9.x")]) + bytes(99))
    assert "blk.9.x" in read_header(one).tensors


def test_a_wrong_file_ends_with_code_2_and_nothing_written(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"PK\x03\x04 and so on")
    text = (made / "run.yaml").read_text(encoding="utf-8").replace(str(made / "base"), str(wrong))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text.replace(str(made / "run"), str(tmp_path / "run")), encoding="utf-8")
    for verb in ("plan", "train"):
        monkeypatch.setattr(sys, "argv", ["qd2mora", verb, str(recipe)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert "is no GGUF file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_tensor_that_no_family_has_is_named(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_header(file)
    more = gguf_header.GgufHeader(found.content, found.tensors | {"blk.0.odd": found.tensors["token_embd.weight"]})
    monkeypatch.setattr("qd2mora.base.gguf_base._header_in_state", lambda *args: more)
    with pytest.raises(InputRefused, match=r"holds blk\.0\.odd, which a llama has no place for"):
        gguf_tensors(str(file))
