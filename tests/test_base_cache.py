"""4-bit weights that are kept: the same bits the second time, and never those of another base, nor damaged ones."""

import fcntl
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, PreTrainedModel

from qd2mora.base import load_base
from qd2mora.base.cache import CachedWeights
from qd2mora.disk.sealed import open_manifest, seal_text, unseal_text, verify_folder
from qd2mora.disk.tensor_file import stored_tensors
from qd2mora.recipe import Base, load_recipe
from qd2mora.training import train

IDS = torch.arange(3, 27).view(2, 12)


class _Quantised(TorchDispatchMode):
    """Counts weights that are quantised while it is on."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "quantize_4bit" in str(func) and "dequantize" not in str(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("base"))


def base_of(kind: str, folder: Path, tmp_path: Path) -> str:
    if kind == "tied":
        return str(folder)
    if kind == "random":
        return "random:tiny"
    whole = LlamaForCausalLM.from_pretrained(tiny.save_base(tmp_path / "whole", tied=False))
    whole.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    return str(tmp_path / "shards")


def entry_in(cache: Path) -> Path:
    (place,) = [path for path in cache.iterdir() if path.is_dir()]
    return place


def counted_load(base: Base, keep_from: int | None = None) -> tuple[PreTrainedModel, int]:
    with _Quantised() as quantised:
        model = load_base(base, keep_from=keep_from)
    return model, quantised.count


def same_bits(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    left, right = one.state_dict(), other.state_dict()
    left |= dict(one.named_buffers())
    right |= dict(other.named_buffers())
    equal = all(left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left)
    return left.keys() == right.keys() and equal and torch.equal(one(IDS).logits, other(IDS).logits)


@pytest.mark.parametrize("kind", ["tied", "shards", "random"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_the_second_start_reads_the_same_bits_and_quantises_nothing(
    kind: str, double_quant: bool, folder: Path, tmp_path: Path
) -> None:
    model = base_of(kind, folder, tmp_path)
    base = Base(model=model, double_quant=double_quant, cache=str(tmp_path / "kept"))
    plain = load_base(base.model_copy(update={"cache": "none"}))
    first, num_first = counted_load(base, keep_from=0)
    second, num_second = counted_load(base, keep_from=0)
    assert (num_first, num_second) == (14, 0)
    assert same_bits(first, plain)
    assert same_bits(second, plain)
    assert second.generation_config.to_dict() == plain.generation_config.to_dict()
    assert second.name_or_path == plain.name_or_path == ("" if kind == "random" else model)
    for one, other in zip(plain.modules(), second.modules(), strict=True):
        assert type(one) is type(other)
        assert one.training == other.training
    verify_folder(entry_in(tmp_path / "kept"))


@pytest.mark.parametrize(("keep_from", "cache"), [(None, "kept"), (1 << 40, "kept"), (0, "none"), (0, "auto")])
def test_nothing_is_kept_unasked(keep_from: int | None, cache: str, folder: Path, tmp_path: Path) -> None:
    place = str(tmp_path / "kept") if cache == "kept" else cache
    load_base(Base(model=str(folder), cache=place), keep_from=keep_from)
    assert not list(tmp_path.iterdir())


def _flip(place: Path) -> None:
    shard = place / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 4
    shard.write_bytes(content)


def _cut(place: Path) -> None:
    shard = place / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-64])


def _edit_config(place: Path) -> None:
    config = place / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 10.0'))


def _lose(place: Path) -> None:
    (place / "config.json").unlink()


def _other_version(place: Path) -> None:
    manifest = place / "manifest.json"
    content = unseal_text(manifest.read_bytes(), "")
    content["made_of"]["bitsandbytes"] = "0.1.2"
    manifest.write_text(seal_text(content))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_flip, "is not what was written"),
        (_cut, "is not what was written"),
        (_edit_config, "is not what was written"),
        (_lose, "lacks 'config.json'"),
        (_other_version, "was made with bitsandbytes 0.1.2, and now it is 0.5"),
    ],
)
def test_what_is_damaged_or_stale_is_told_in_a_line_and_made_anew(
    harm: Callable[[Path], None], words: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = Base(model=str(folder), cache=str(tmp_path))
    first = load_base(base, keep_from=0)
    harm(entry_in(tmp_path))
    anew, count = counted_load(base)
    assert count == 14
    assert same_bits(anew, first)
    assert [words in line and "\n" not in line for line in caplog.messages] == [True]
    caplog.clear()
    load_base(base, keep_from=0)  # a run replaces it
    caplog.clear()
    assert counted_load(base)[1] == 0
    assert not caplog.messages


def test_weights_of_another_base_in_the_same_place_are_stale(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = Base(model=str(tiny.save_base(tmp_path / "base")), cache=str(tmp_path / "kept"))
    before = load_base(base, keep_from=0)
    tiny.save_base(tmp_path / "base", seed=1)
    after, count = counted_load(base, keep_from=0)
    assert count == 14
    assert not same_bits(after, before)
    assert "was made with base " in caplog.text
    assert same_bits(counted_load(base)[0], after)


def test_each_setting_has_weights_of_its_own(folder: Path, tmp_path: Path) -> None:
    settings = [{}, {"double_quant": False}, {"compute_dtype": "bfloat16"}]
    for _ in range(2):
        counts = [
            counted_load(Base(model=str(folder), cache=str(tmp_path), **setting), keep_from=0)[1]
            for setting in settings
        ]
    assert counts == [0, 0, 0]
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 3


def test_writers_at_once_leave_one_whole_entry(tmp_path: Path) -> None:
    entry = CachedWeights(tmp_path / "entry", {"base": "x"})
    tensors = {"weight": torch.arange(1 << 16)}

    def act(number: int) -> bool:
        if number % 2:
            entry.write(tensors, lambda folder: (folder / "config.json").write_text("{}"))
            return True
        with entry.opened() as is_whole:
            # Where it is there it is whole, until the block ends.
            shard = entry.folder / "model.safetensors"
            return not is_whole or torch.equal(load(shard.read_bytes())["weight"], tensors["weight"])

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(act, range(60)))
    verify_folder(entry.folder)
    assert {path.name for path in tmp_path.iterdir()} == {"entry", ".entry.lock"}


def test_what_another_process_is_writing_is_left_to_it(folder: Path, tmp_path: Path) -> None:
    base = Base(model=str(folder), cache=str(tmp_path))
    first = load_base(base, keep_from=0)
    place = entry_in(tmp_path)
    _other_version(place)
    before = (place / "manifest.json").read_bytes()
    with (tmp_path / f".{place.name}.lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert same_bits(load_base(base, keep_from=0), first)
    assert (place / "manifest.json").read_bytes() == before


def test_a_cache_that_cannot_be_written_costs_a_line(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert load_base(Base(model=str(folder), cache=str(tmp_path / "file")), keep_from=0) is not None
    assert ["are not kept in" in line for line in caplog.messages] == [True]


def test_a_manifest_sealed_by_somebody_else_opens_no_other_file(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = Base(model=str(folder), cache=str(tmp_path / "kept"))
    first = load_base(base, keep_from=0)
    place = entry_in(tmp_path / "kept")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "x.y"}}))
    content, edited = open_manifest(place), (place / "config.json").read_bytes()
    content["files"]["config.json"] = {"bytes": len(edited), "sha256": hashlib.sha256(edited).hexdigest()}
    (place / "manifest.json").write_text(seal_text(content))
    again, count = counted_load(base)
    assert count == 14
    assert same_bits(again, first)
    assert "asks for code of its own" in caplog.text


def test_tensors_are_read_into_memory_of_their_own(tmp_path: Path) -> None:
    path = tiny.save_base(tmp_path) / "model.safetensors"
    there, wanted = stored_tensors([path]), load(path.read_bytes())
    assert there.keys() == wanted.keys()
    for name, tensor in there.items():
        assert torch.equal(tensor[...], wanted[name])
        assert torch.equal(tensor[1:3], wanted[name][1:3])
    read = [tensor[...] for tensor in there.values()]
    # What is mapped would count as this process's memory.
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert len(read) == len(wanted)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(OSError, match="cut short"):
        [tensor[...] for tensor in there.values()]


def test_a_run_on_kept_weights_ends_with_the_same_adapter(folder: Path, tmp_path: Path) -> None:
    tiny.save_tasks(tmp_path / "data")
    adapters = []
    for name, cache in (("plain", "auto"), ("first", "kept"), ("second", "kept")):
        path = tmp_path / f"{name}.yaml"
        path.write_text(tiny.recipe_text(folder, tmp_path / "data", tmp_path / name))
        place = str(tmp_path / "kept") if cache == "kept" else cache
        train(load_recipe(path, [f"base.cache={place}", "train.steps=2"]))
        adapters.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1] == adapters[2]
    assert not (tmp_path / "quantised").exists()  # too small to be kept unasked
    assert entry_in(tmp_path / "kept")
