"""The GGUF export: every number and token read back, and what llama.cpp makes of them done slowly here."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from exported import make_run
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qd2mora.base.gguf_forms import llama3_factors
from qd2mora.base.gguf_tokens import BYTE, CONTROL, UNKNOWN, UNUSED
from qd2mora.errors import InputRefused
from qd2mora.merging import ExportOptions, merge
from qd2mora.merging.base_weights import BaseWeights
from qd2mora.merging.gguf_file import rotated_in_pairs, write_gguf
from qd2mora.merging.gguf_vocab import SPACE, vocabulary_of
from qd2mora.recipe import Base

gguf = pytest.importorskip("gguf")
HEADS, KV_HEADS = 4, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    run = make_run(folder, "lora", tied=False)
    merge(run, folder / "hf", ExportOptions(dtype="float32"))
    for dtype in ("float16", "q8_0"):
        merge(run, folder / dtype, ExportOptions(to="gguf", dtype=dtype))
    for to in ("lora", "gguf_lora"):
        merge(run, folder / to, ExportOptions(to=to))
    return folder


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, object], dict[str, str]]:
    reader = gguf.GGUFReader(next(folder.glob("*.gguf")))
    tensors = {
        each.name: torch.from_numpy(gguf.quants.dequantize(each.data, each.tensor_type).copy())
        for each in reader.tensors
    }
    settings = {name: each.contents() for name, each in reader.fields.items()}
    return tensors, settings, {each.name: each.tensor_type.name for each in reader.tensors}


def paired(rows: Tensor, heads: int) -> Tensor:
    """Row 2 i of a head is row i of its first half, row 2 i + 1 that of its second."""
    size, out = len(rows) // heads, torch.empty_like(rows)
    for head in range(heads):
        for place in range(size):
            half, index = place % 2, place // 2
            out[head * size + place] = rows[head * size + half * size // 2 + index]
    return out


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}


@pytest.mark.parametrize("dtype", ["float16", "q8_0"])
def test_every_weight_stands_under_its_name_in_its_order(folder: Path, dtype: str) -> None:
    tensors, _, kinds = read(folder / dtype)
    merged = load_file(folder / "hf" / "model.safetensors")
    assert len(tensors) == len(merged)
    for name, weight in merged.items():
        other = name
        for ours, theirs in NAMES.items():
            other = other.replace(ours, theirs)
        heads = HEADS if ".q_proj" in name else KV_HEADS if ".k_proj" in name else 0
        wanted = paired(weight, heads) if heads else weight
        found, kind = tensors[other].float(), kinds[other]
        assert found.shape == wanted.shape
        if weight.dim() == 1:
            assert kind == "F32" and found.equal(wanted)
        elif dtype == "float16" or weight.shape[1] % 32:  # down_proj's 172 columns do not divide into blocks
            assert kind == "F16" and found.equal(wanted.half().float())
        else:
            step = wanted.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
            error = (found - wanted).unflatten(1, (-1, 32)).abs()
            assert kind == "Q8_0" and (error > 0).any()
            assert (error <= (0.5 + 127 / 2048) * step).all()  # half a step, and a scale rounded to float16


def test_a_lora_for_llama_cpp_is_that_for_peft_in_its_names_and_order(folder: Path) -> None:
    peft = load_file(folder / "lora" / "adapter_model.safetensors")
    tensors, settings, kinds = read(folder / "gguf_lora")
    assert settings["general.type"] == "adapter" and settings["adapter.type"] == "lora"
    rank = json.loads((folder / "lora" / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    assert settings["adapter.lora.alpha"] == rank and set(kinds.values()) == {"F32"}
    assert len(tensors) == len(peft)
    for name, tensor in peft.items():
        theirs = name.removeprefix("base_model.model.")
        for old, new in (NAMES | {".lora_A.weight": ".weight.lora_a", ".lora_B.weight": ".weight.lora_b"}).items():
            theirs = theirs.replace(old, new)
        wanted = paired(tensor, HEADS) if "q_proj.lora_B" in name else tensor
        assert tensors[theirs].equal(wanted), name


def test_pairs_rotated_by_llama_cpp_score_as_halves_rotated_by_transformers() -> None:
    torch.manual_seed(0)
    size, x = 8, torch.randn(5, 6, dtype=torch.float64)
    weights = torch.randn(2, size, 6, dtype=torch.float64)
    angles = torch.arange(5)[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
    sin, cos = angles.sin(), angles.cos()

    def by_halves(y: Tensor) -> Tensor:
        first, second = y.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def by_pairs(y: Tensor) -> Tensor:
        first, second = y[:, 0::2], y[:, 1::2]
        return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(1)

    halves = [by_halves(x @ weight.T) for weight in weights]
    pairs = [by_pairs(x @ torch.from_numpy(rotated_in_pairs(weight.numpy(), 1)).T) for weight in weights]
    torch.testing.assert_close(halves[0] @ halves[1].T, pairs[0] @ pairs[1].T)


def test_settings_and_vocabulary_are_the_models(folder: Path) -> None:
    _, settings, _ = read(folder / "float16")
    assert settings["general.architecture"] == "llama"
    wanted = {"block_count": 2, "embedding_length": 64, "feed_forward_length": 172, "context_length": 256}
    wanted |= {"attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "rope.dimension_count": 16}
    assert {key: settings[f"llama.{key}"] for key in wanted} == wanted
    assert settings["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "hf")
    tokens, kinds = settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.token_type"]
    assert settings["tokenizer.ggml.model"] == "gpt2" and settings["tokenizer.ggml.pre"] == "gpt-2"
    assert len(tokens) == len(kinds) == 512
    assert [tokens[each] for each in range(len(tokenizer))] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert kinds[1:4] == [CONTROL] * 3
    assert set(kinds[len(tokenizer) :]) <= {UNUSED}
    assert settings["tokenizer.ggml.bos_token_id"] == 1 and settings["tokenizer.ggml.eos_token_id"] == 2
    assert settings["tokenizer.ggml.add_bos_token"] is True and settings["tokenizer.ggml.add_eos_token"] is False


def marked_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as LLaMA 2's: BPE over text with marked spaces, bytes for what it does not know."""
    texts = [" ".join(tiny.WORDS[place:] + tiny.WORDS[:place]) for place in range(len(tiny.WORDS))]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=90, show_progress=False))
    content = json.loads(trained.to_str())
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *content["model"]["vocab"]]
    merges = [tuple(each) for each in content["model"]["merges"]]
    model = models.BPE({name: place for place, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True)
    whole = Tokenizer(model)
    whole.normalizer = trained.normalizer
    whole.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_scores_make_llama_cpp_join_pieces_as_the_merges_do() -> None:
    tokenizer = marked_tokenizer()
    vocabulary = vocabulary_of(tokenizer, 400)
    assert vocabulary.model == "llama" and vocabulary.adds_space and vocabulary.merges is None
    assert vocabulary.kinds[0] == UNKNOWN and vocabulary.kinds[1] == CONTROL and vocabulary.kinds[3] == BYTE
    number, scores = {token: place for place, token in enumerate(vocabulary.tokens)}, vocabulary.scores
    assert scores is not None
    for text in ("red moon", "three threes", "starbird one", "sun  cat", "zé"):
        pieces = list(SPACE + text.replace(" ", SPACE))
        while True:  # llama.cpp's rule: always join the pair whose token has the highest score, the leftmost first
            joined = [number.get(a + b) for a, b in pairwise(pieces)]
            pairs = [(scores[each], -at) for at, each in enumerate(joined) if each is not None]
            if not pairs:
                break
            at = -max(pairs)[1]
            pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
        ids = []
        for piece in pieces:
            ids += [number[piece]] if piece in number else [number[f"<0x{byte:02X}>"] for byte in piece.encode()]
        assert ids == tokenizer(text)["input_ids"], text


def test_a_tokenizer_that_llama_cpp_would_cut_otherwise_is_refused_or_left_out(folder: Path, tmp_path: Path) -> None:
    tiny.save_tokenizer(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert vocabulary_of(tokenizer, 512).cut == "gpt-2"
    with pytest.raises(InputRefused, match="the embedding 300 rows"):
        vocabulary_of(tokenizer, 300)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(InputRefused, match="cuts text as this tokenizer does; --no-vocabulary"):
        vocabulary_of(tokenizer, 512)
    source = BaseWeights(Base(model=str(folder / "base"), quantization="none"))
    write_gguf(source, tokenizer, {}, tmp_path, name="model", with_vocabulary=False)
    tensors, settings, _ = read(tmp_path)
    assert len(tensors) == len(read(folder / "float16")[0]) and settings["llama.vocab_size"] == 512
    kept = {name for name in settings if name.startswith("tokenizer.")}
    assert kept == {"tokenizer.ggml.model"} and settings["tokenizer.ggml.model"] == "none"


def test_llama_3_positions_come_out_as_transformers_makes_them() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** (-torch.arange(0, 128, 2) / 128)
    found = plain / llama3_factors(config.rope_parameters, 128)
    torch.testing.assert_close(found, scaled, rtol=1e-5, atol=0)
    assert math.isclose(float(scaled[0]), 1.0) and float(plain[-1] / scaled[-1]) == pytest.approx(8.0)


@pytest.mark.parametrize("dtype", ["float16", "q8_0"])
def test_another_reader_of_the_format_makes_the_same_model_of_it(folder: Path, dtype: str) -> None:
    path = next((folder / dtype).glob("*.gguf"))
    ids = torch.arange(4, 24).view(2, 10)
    with torch.no_grad():
        read_back = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
        found = read_back(input_ids=ids).logits
        wanted = AutoModelForCausalLM.from_pretrained(folder / "hf")(input_ids=ids).logits
    # Rounding of weights: 11 bits in float16, 8 in Q8_0.
    assert float((found - wanted).norm() / wanted.norm()) < {"float16": 1e-3, "q8_0": 2e-2}[dtype]
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = AutoTokenizer.from_pretrained(folder / "hf")
    for text in ("red moon", "Say the first word.", "three  suns é"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours(text, add_special_tokens=False)["input_ids"]


def test_the_report_says_what_eight_bits_take_from_an_update_and_that_it_was_measured_before(folder: Path) -> None:
    report = json.loads((folder / "q8_0" / "export_report.json").read_text(encoding="utf-8"))
    assert report["measured"] == "before rounding to q8_0"
    name, lora = "model.layers.1.self_attn.v_proj", load_file(folder / "lora" / "adapter_model.safetensors")
    down, up = (lora[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    wanted = load_file(folder / "hf" / "model.safetensors")[f"{name}.weight"]
    found = read(folder / "q8_0")[0]["blk.1.attn_v.weight"].reshape(wanted.shape)
    lost = float((found - wanted).norm() / (up @ down).norm())
    assert report["modules"][name]["rounding"] == pytest.approx(lost, rel=1e-3) and lost > 0
