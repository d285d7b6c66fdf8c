"""The frozen model: 4-bit where it should be, untouched by use, and refused where it is not there."""

import shutil
from pathlib import Path

import bitsandbytes as bnb
import pytest
import tiny
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from qd2mora.base import SHAPES, dense_weight, fingerprint, is_nf4, load_base, load_tokenizer, random_base
from qd2mora.errors import DamagedFile, InputRefused
from qd2mora.memory.checkpointing import enable_checkpointing
from qd2mora.recipe import Base

IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("model", ["folder", "random:tiny"])
def test_linears_are_4_bit_and_the_rest_is_in_the_compute_dtype(model: str, folder: Path) -> None:
    base = load_base(Base(model=str(folder) if model == "folder" else model))
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear):
            assert is_nf4(module) == (name != "lm_head"), name
    assert {tensor.dtype for tensor in base.parameters()} == {torch.uint8, torch.float32}
    assert not any(tensor.requires_grad for tensor in base.parameters())
    assert torch.isfinite(base(IDS).logits).all()


def test_a_weight_is_dequantised_as_bitsandbytes_does(folder: Path) -> None:
    linear = load_base(Base(model=str(folder))).get_submodule("model.layers.1.mlp.up_proj")
    wanted = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    assert torch.equal(dense_weight(linear), wanted.float())
    assert wanted.shape == (172, 64)


def test_without_quantisation_the_weights_are_those_of_the_file(folder: Path) -> None:
    base = load_base(Base(model=str(folder), quantization="none"))
    assert not any(is_nf4(module) for module in base.modules())


def test_a_forward_pass_in_evaluation_leaves_the_weights_as_they_were(folder: Path) -> None:
    base = load_base(Base(model=str(folder))).eval()
    linears = [module for module in base.modules() if is_nf4(module)]
    before = [(dense_weight(linear), linear.weight.data.clone()) for linear in linears]
    with torch.no_grad():
        base(IDS)
    for linear, (dense, packed) in zip(linears, before, strict=True):
        assert torch.equal(dense_weight(linear), dense)
        assert torch.equal(linear.weight.data, packed)
    states = base.get_input_embeddings()(IDS).detach().requires_grad_()
    base(inputs_embeds=states).logits.sum().backward()
    assert torch.isfinite(states.grad).all()


def test_a_random_base_is_the_same_for_the_same_seed() -> None:
    base = Base(model="random:tiny")
    one, two = (random_base(SHAPES["tiny"], base, torch.device("cpu"), seed=4) for _ in range(2))
    other = random_base(SHAPES["tiny"], base, torch.device("cpu"), seed=5)
    assert torch.equal(one(IDS).logits, two(IDS).logits)
    assert not torch.equal(one(IDS).logits, other(IDS).logits)


class _LiveFloats(TorchDispatchMode):
    """Tracks the largest number of floating-point bytes alive at once among tensors made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.live: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.device.type == "cpu":
                self.live[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def test_a_random_base_is_quantised_linear_by_linear() -> None:
    shape = SHAPES["tiny"]
    with _LiveFloats() as floats:
        base = random_base(shape, Base(model="random:tiny"), torch.device("cpu"))
    linears = [module for module in base.modules() if isinstance(module, bnb.nn.Linear4bit)]
    whole = sum(4 * module.in_features * module.out_features for module in linears)
    largest = max(4 * module.in_features * module.out_features for module in linears)
    kept = sum(tensor.nbytes for tensor in base.parameters() if tensor.is_floating_point())
    # What stays, a few copies of one linear while it is quantised, and the quantisation state of all.
    assert floats.peak <= kept + 4 * largest + whole / 16
    assert floats.peak < whole


def test_recomputing_layers_changes_no_loss(folder: Path) -> None:
    base = load_base(Base(model=str(folder))).train()
    before = base(IDS, labels=IDS).loss
    enable_checkpointing(base)
    assert torch.equal(base(IDS, labels=IDS).loss, before)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("./nowhere", "no folder './nowhere'"),
        ("a/b/c", "no folder 'a/b/c'"),
        ("random:huge", "no shape 'huge'"),
    ],
)
def test_a_base_that_is_not_there_is_named(model: str, words: str) -> None:
    with pytest.raises(InputRefused, match=words):
        load_base(Base(model=model))


def test_a_folder_that_holds_no_model_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"config\.json"):
        load_base(Base(model=str(tmp_path)))
    with pytest.raises(InputRefused, match="is a file"):
        load_base(Base(model=str(folder / "config.json")))
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(DamagedFile, match=r"model\.safetensors"):
        load_base(Base(model=str(broken)))


def test_a_tokenizer_gets_a_pad_token_that_is_not_the_end(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token == "<pad>"
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.pad_token_id is not None
    assert again.pad_token_id != again.eos_token_id
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(InputRefused, match="no end token"):
        load_tokenizer(str(tmp_path / "endless"))
    with pytest.raises(InputRefused, match="no tokenizer"):
        load_tokenizer("random:tiny")


def test_the_fingerprint_tells_bases_apart(folder: Path, tmp_path: Path) -> None:
    other = tiny.save_base(tmp_path / "other", seed=1)
    marks = {
        fingerprint(Base(model=str(folder))),
        fingerprint(Base(model=str(other))),
        fingerprint(Base(model="random:tiny")),
    }
    assert len(marks) == 3
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert fingerprint(Base(model=str(moved))) in marks
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert fingerprint(Base(model=str(moved))) not in marks
