"""The writer: weights one at a time from the base's files, every one once, whole or not at all, in little memory."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from exported import make_run
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from qd2mora.base import dense_weight, load_base, load_tokenizer
from qd2mora.disk.sealed import verify_folder
from qd2mora.disk.shards import write_shards
from qd2mora.disk.tensor_file import TensorToWrite
from qd2mora.errors import InputRefused, NotFinite
from qd2mora.merging import ExportOptions, merge
from qd2mora.merging.base_weights import BaseWeights
from qd2mora.merging.hf_folder import write_model
from qd2mora.merging.rungs import shard_bytes
from qd2mora.merging.updated_weights import WeightUpdate
from qd2mora.recipe import Base, load_recipe
from qd2mora.training import train


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("base"), tied=request.param)


def dense(source: BaseWeights, name: str) -> Tensor:
    return torch.cat([rows for _, rows in source.blocks(name)])


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_weight_read_from_files_is_the_one_that_training_saw(folder: Path, double_quant: bool) -> None:
    base = Base(model=str(folder), double_quant=double_quant)
    model, source, original = load_base(base), BaseWeights(base), BaseWeights(base, original=True)
    stored = load_file(folder / "model.safetensors")
    assert source.names == [name for name, _ in model.named_parameters()]
    for name in source.names:
        module = model.get_submodule(name.removesuffix(".weight"))
        seen = dense_weight(module) if isinstance(module, torch.nn.Linear) else module.weight
        assert dense(source, name).equal(seen), name
        assert dense(original, name).equal(stored[name]), name
    assert not dense(source, "model.layers.0.mlp.up_proj.weight").equal(stored["model.layers.0.mlp.up_proj.weight"])


def test_a_base_stored_in_four_bits_is_only_dequantised(folder: Path, tmp_path: Path) -> None:
    first = load_base(Base(model=str(folder)))
    first.save_pretrained(tmp_path / "packed")
    base = Base(model=str(tmp_path / "packed"))
    source = BaseWeights(base)
    for name in source.names:
        module = first.get_submodule(name.removesuffix(".weight"))
        seen = dense_weight(module) if isinstance(module, torch.nn.Linear) else module.weight
        assert dense(source, name).equal(seen), name
        assert source.shape(name) == tuple(seen.shape)
    with pytest.raises(InputRefused, match="--base original"):
        BaseWeights(base, original=True)


def test_shards_hold_every_weight_once_and_load(folder: Path, tmp_path: Path) -> None:
    source = BaseWeights(Base(model=str(folder)))
    write_model(source, load_tokenizer(str(folder)), {}, tmp_path, limit=60_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    found = {name: shard.name for shard in tmp_path.glob("*.safetensors") for name in load_file(shard)}
    assert found == index["weight_map"] and len(set(found.values())) > 2
    assert index["metadata"]["total_size"] == sum(2 * dense(source, name).numel() for name in source.names)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    for name, parameter in again.named_parameters():
        assert parameter.equal(dense(source, name).half().float()), name
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float16"


def shifted(rows: Tensor, start: int) -> Tensor:
    return rows + 1e-3 * torch.arange(start, start + len(rows)).view(-1, 1)


def test_an_output_matrix_with_an_update_of_its_own_is_untied(folder: Path, tmp_path: Path) -> None:
    source, folds = BaseWeights(Base(model=str(folder))), {"lm_head": shifted}
    before = AutoModelForCausalLM.from_pretrained(folder)
    write_model(source, load_tokenizer(str(folder)), folds, tmp_path, dtype="float32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    wanted = shifted(before.lm_head.weight.detach(), 0)
    assert again.lm_head.weight.equal(wanted)
    assert again.model.embed_tokens.weight.equal(before.model.embed_tokens.weight)


def test_rounding_is_measured_against_the_update(folder: Path, tmp_path: Path) -> None:
    name, shares = "model.layers.0.mlp.up_proj", {}
    source, folds = BaseWeights(Base(model=str(folder))), {name: shifted}
    weight = dense(source, f"{name}.weight")
    for dtype in ("float16", "bfloat16"):
        (tmp_path / dtype).mkdir()
        written = write_model(source, load_tokenizer(str(folder)), folds, tmp_path / dtype, dtype=dtype)
        exact = shifted(weight, 0)
        error = exact.to(getattr(torch, dtype)).float() - exact
        assert written.rounding == {name: pytest.approx(float(error.norm() / (exact - weight).norm()), rel=1e-4)}
        shares[dtype] = written.rounding[name]
    assert shares["bfloat16"] > 4 * shares["float16"] > 0


def test_a_weight_too_large_for_float16_is_refused_and_bfloat16_holds_it(folder: Path, tmp_path: Path) -> None:
    huge: dict[str, WeightUpdate] = {"model.layers.1.mlp.up_proj": lambda rows, start: rows + 1e5}
    source, tokenizer = BaseWeights(Base(model=str(folder))), load_tokenizer(str(folder))
    with pytest.raises(NotFinite, match=r"layers\.1\.mlp\.up_proj\.weight: .* float16; --dtype bfloat16"):
        write_model(source, tokenizer, huge, tmp_path)
    write_model(source, tokenizer, huge, tmp_path, dtype="bfloat16")


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500 MiB", 500 << 20), ("1.5kb", 1500), ("64", 64)])
def test_a_size_is_read(text: str, size: int) -> None:
    assert shard_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 horses", "-1GB", "nanGB", "0"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputRefused, match="--max-shard"):
        shard_bytes(text)


def test_original_and_dequantized_bases_differ_and_both_are_sealed(tmp_path: Path) -> None:
    run = make_run(tmp_path, "lora")
    for base in ("dequantized", "original"):
        merge(run, tmp_path / base, ExportOptions(base=base, dtype="bfloat16"))
        verify_folder(tmp_path / base)
        assert json.loads((tmp_path / base / "export_report.json").read_text(encoding="utf-8"))["base"] == base
    # A linear without an adapter: there the two bases differ by quantisation alone.
    name = "model.layers.0.mlp.up_proj.weight"
    ours, original = (load_file(tmp_path / base / "model.safetensors") for base in ("dequantized", "original"))
    assert original[name].equal(load_file(tmp_path / "base" / "model.safetensors")[name].bfloat16())
    assert not ours[name].equal(original[name])


def test_a_base_with_tensors_of_any_dtype_that_no_layer_reads_loads_trains_and_merges(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    dtypes = (torch.int16, torch.uint16, torch.float8_e4m3fn, torch.complex64)
    extra = {f"model.seen_{number}": torch.zeros(8, 4).to(dtype) for number, dtype in enumerate(dtypes)}
    save_file(tensors | extra, base / "model.safetensors", metadata={"format": "pt"})
    tiny.save_tasks(tmp_path / "data")
    (tmp_path / "recipe.yaml").write_text(tiny.recipe_text(base, tmp_path / "data", tmp_path / "run"))
    train(load_recipe(tmp_path / "recipe.yaml", ["train.steps=1"]))
    merge(tmp_path / "run", tmp_path / "out", ExportOptions(strategy="core_lsq"))
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()


def _killed_at_the_third_shard(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and "model-00003" in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_while_a_shard_is_written_leaves_nothing_and_a_restart_is_whole(tmp_path: Path) -> None:
    run, out = make_run(tmp_path, "lora"), tmp_path / "out"
    child = os.fork()
    if child == 0:
        sys.addaudithook(_killed_at_the_third_shard)
        try:
            merge(run, out, ExportOptions(max_shard="40KB"))
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not out.exists() and len(list(tmp_path.glob(".out.*.partial/*.safetensors"))) == 2
    merge(run, out)
    verify_folder(out)
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]  # nothing of the killed one
    assert not list(tmp_path.glob(".out.*"))


LAYERS, HIDDEN, WIDE, VOCAB = 4, 512, 8192, 512


def save_wide_base(folder: Path) -> int:
    """Save a base of random float16 weights in several files, never whole in memory; return its entries."""
    tiny.save_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: each.shape for name, each in AutoModelForCausalLM.from_config(config).named_parameters()}
    entries = [
        TensorToWrite(name, torch.float16, tuple(shape), lambda shape=shape: iter([torch.randn(shape).half() / 50]))
        for name, shape in shapes.items()
    ]
    write_shards(folder, entries, 30_000_000)
    return sum(shape.numel() for shape in shapes.values())


@pytest.mark.long
def test_the_peak_is_two_weights_whatever_the_size_of_the_model(tmp_path: Path) -> None:
    entries = save_wide_base(tmp_path / "base")
    tiny.save_base(tmp_path / "small")
    (tmp_path / "out").mkdir()
    code = f"""
import pathlib, re, torch
from qd2mora.base import load_tokenizer
from qd2mora.merging.base_weights import BaseWeights
from qd2mora.merging.hf_folder import write_model
from qd2mora.merging.rungs import shard_bytes
from qd2mora.merging.updated_weights import WeightUpdate
from qd2mora.recipe import Base
def memory(key):
    return int(re.search(key + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
torch.set_num_threads(1)
source = BaseWeights(Base(model={str(tmp_path / "base")!r}))
up, down = torch.randn({WIDE}, 8), torch.randn(8, {HIDDEN})
folds = {{f"model.layers.{{layer}}.mlp.up_proj": lambda rows, start: rows + up[start:start + len(rows)] @ down
         for layer in range({LAYERS})}}
tokenizer = load_tokenizer({str(tmp_path / "base")!r})
warm = pathlib.Path({str(tmp_path / "warm")!r})
warm.mkdir()
small = BaseWeights(Base(model={str(tmp_path / "small")!r}))
write_model(small, tokenizer, {{"model.layers.0.mlp.up_proj": lambda rows, start: rows + 1}}, warm)  # fetches the code
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = memory("VmRSS")
write_model(source, tokenizer, folds, pathlib.Path({str(tmp_path / "out")!r}), limit=50_000_000)
print(memory("VmHWM") - before)"""
    # What is freed goes back to the system, so that the peak is what lived.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    grown, largest = int(done.stdout), 4 * HIDDEN * WIDE
    assert grown < 2 * largest + (32 << 20) < 2 * entries, grown  # a half of what is written
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3
