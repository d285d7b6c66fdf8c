"""S1, M1, T1 of what a run leaves: the adapter in a fresh process, its merge into plain weights, a signal meanwhile."""

import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import forked_runs as runs
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from qd2mora.adapter_folder import CONFIG, WEIGHTS, base_identity, save_adapter
from qd2mora.base import dense_weight, load_base, load_tokenizer
from qd2mora.disk.sealed import MANIFEST, seal_folder, unseal_text
from qd2mora.errors import DamagedFile, InputRefused
from qd2mora.merging import constant_mixing
from qd2mora.merging.base_weights import BaseWeights
from qd2mora.merging.hf_folder import write_model
from qd2mora.merging.static_updates import of_cores
from qd2mora.merging.updated_weights import weight_updates_of
from qd2mora.mixture import MixtureConfig, add_adapter, mixture_layers
from qd2mora.recipe import load_recipe
from qd2mora.run_folder import open_run

MERGES = int(os.environ.get("GATE_MERGES", "4"))
SIGNALS = max(3, int(os.environ.get("GATE_SIGNALS", "15")) // 5)
TOKENS = torch.randint(4, 400, (2, 17), generator=torch.Generator().manual_seed(0))


def make_run(made: Path, folder: Path, seed: int = 0, method: str = "d2mora") -> Path:
    """Save a run whose adapter is random, so that routing matters, without training."""
    run = folder / "run"
    run.mkdir(parents=True)
    text = tiny.recipe_text(made / "base", made / "data", run, method=method)
    (run / "recipe.yaml").write_text(text, encoding="utf-8")
    recipe = load_recipe(run / "recipe.yaml")
    model = add_adapter(load_base(recipe.base), MixtureConfig.from_recipe(recipe.adapter, 2), seed)
    randomize(model, seed)
    save_adapter(model, run / "adapter", base_identity(recipe.base))
    load_tokenizer(recipe.base.model).save_pretrained(run)
    return run


def randomize(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        if "mixture_" in name:
            nn.init.normal_(tensor, std=0.1 if "mixture_B" in name else 0.3, generator=generator)


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def answering(run: Path, out: Path) -> None:
    """Open a run and save its logits, in a fork of a server that has seen no adapter of this process."""
    save_file({"logits": logits_of(open_run(run).model)}, out)


def test_an_adapter_gives_the_same_logits_in_a_fresh_process(made: Path, tmp_path: Path) -> None:
    """S1: bit for bit, and not those of the base."""
    run = make_run(made, tmp_path)
    recipe = load_recipe(run / "recipe.yaml")
    torch.set_num_threads(1)
    model = add_adapter(load_base(recipe.base), MixtureConfig.from_recipe(recipe.adapter, 2), 0)
    assert not logits_of(model).equal(wanted := (randomize(model, 0), logits_of(model))[1])
    assert runs.outcome(answering, run, tmp_path / "there", log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert load_file(tmp_path / "there")["logits"].equal(wanted)


def reseal(folder: Path, is_declared: bool = True) -> None:
    """Seal an adapter anew, as somebody would who knows the format; `is_declared`: its tensors are listed anew too."""
    import hashlib

    manifest = unseal_text((folder / MANIFEST).read_bytes(), "")
    contents = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    there = load_file(folder / WEIGHTS)
    inventory = {name: [str(each.dtype)[6:], list(each.shape)] for name, each in sorted(there.items())}
    files = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in contents.items()}
    listed = inventory if is_declared else manifest["inventory"]
    seal_folder(folder, files, {"identity": manifest["identity"], "inventory": listed})


Tensors = dict[str, torch.Tensor]
EDITS: dict[str, Callable[[Tensors, str], object]] = {
    "gone": lambda tensors, name: tensors.pop(name),
    "cut": lambda tensors, name: tensors.update({name: tensors[name][..., :-1].contiguous()}),
    "another shape": lambda tensors, name: tensors.update({name: tensors[name].unsqueeze(0)}),
    "another dtype": lambda tensors, name: tensors.update({name: tensors[name].half()}),
    "renamed": lambda tensors, name: tensors.update({name.replace("layers.0", "layers.7"): tensors.pop(name)}),
    "one more": lambda tensors, name: tensors.update({name.replace("layers.0", "layers.7"): tensors[name].clone()}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_adapter_whose_tensors_are_not_those_of_its_config_is_refused_in_one_line(
    edit: str, made: Path, tmp_path: Path
) -> None:
    """S1: even where the seal is good."""
    run = make_run(made, tmp_path)
    kept = (run / "adapter" / WEIGHTS).read_bytes()
    kinds = ("mixture_A", "mixture_B", "mixture_router_down")
    for kind, is_declared in itertools.product(kinds, (True, False)):
        (run / "adapter" / WEIGHTS).write_bytes(kept)
        tensors = load_file(run / "adapter" / WEIGHTS)
        EDITS[edit](tensors, next(name for name in tensors if kind in name and "layers.0" in name))
        save_file(tensors, run / "adapter" / WEIGHTS)
        reseal(run / "adapter", is_declared)
        with pytest.raises((DamagedFile, InputRefused), match=WEIGHTS) as refused:
            open_run(run)
        assert "\n" not in str(refused.value)


def test_an_inventory_that_lists_other_tensors_is_refused_in_one_line(made: Path, tmp_path: Path) -> None:
    """S1: where tensors and config fit each other, and only what was declared of them does not."""
    run = make_run(made, tmp_path)
    weights, name = run / "adapter" / WEIGHTS, "base_model.model.model.layers.0.self_attn.q_proj.mixture_A"
    whole = weights.read_bytes()
    tensors = load_file(weights)
    save_file({**tensors, name: tensors.pop(name).half()}, weights)
    reseal(run / "adapter")
    weights.write_bytes(whole)
    reseal(run / "adapter", is_declared=False)
    with pytest.raises(DamagedFile, match=WEIGHTS) as refused:
        open_run(run)
    assert "\n" not in str(refused.value)


def test_a_config_that_asks_for_another_rank_is_refused_in_one_line(made: Path, tmp_path: Path) -> None:
    run = make_run(made, tmp_path)
    path = run / "adapter" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank": 3}))
    reseal(run / "adapter")
    with pytest.raises(DamagedFile, match=WEIGHTS) as refused:
        open_run(run)
    assert "\n" not in str(refused.value)


def test_a_merge_of_constant_gates_answers_as_the_adapter_does(made: Path, tmp_path: Path) -> None:
    """M1: logits to 2e-3 of their size; updates of 1% of their weight to 3%: rounding to float16 is all there is."""
    recipe = load_recipe(make_run(made, tmp_path) / "recipe.yaml")
    tokenizer, source = load_tokenizer(recipe.base.model), BaseWeights(recipe.base)
    logits_apart = updates_apart = 0.0
    for seed in range(MERGES):
        model = add_adapter(load_base(recipe.base), MixtureConfig.from_recipe(recipe.adapter, 2), seed)
        randomize(model, seed)
        for name, tensor in model.named_parameters():
            if "router" in name:
                tensor.data.zero_()
        scale_updates(model, 0.01)
        statics = of_cores(model, constant_mixing(model, 0))
        folder = tmp_path / f"merged{seed % 2}"
        folder.mkdir(exist_ok=True)
        written = write_model(source, tokenizer, weight_updates_of(model, statics), folder)
        merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        wanted = logits_of(model)
        base = load_base(recipe.base)
        assert float((logits_of(base) - wanted).norm() / wanted.norm()) > 2e-3  # there is something to lose
        logits_apart = max(logits_apart, float((logits_of(merged) - wanted).norm() / wanted.norm()))
        there = load_file(folder / "model.safetensors")
        for name, layer in mixture_layers(model).items():
            delta, weight = statics[name].dense(), dense_weight(layer.base_layer)
            assert abs(float(delta.norm() / weight.norm()) - 0.01) < 1e-4
            arrived = float((there[f"{name}.weight"].float() - weight - delta).norm() / delta.norm())
            assert abs(arrived - written.rounding[name]) < 1e-4  # the report says what was lost
            updates_apart = max(updates_apart, arrived)
    print(f"M1 merges={MERGES} logits_apart={logits_apart:.2e} updates_apart={updates_apart:.2e}")
    assert logits_apart <= 2e-3
    assert updates_apart <= 0.03


def scale_updates(model: nn.Module, share: float) -> None:
    """Give every update so large a share of its weight's norm."""
    statics = of_cores(model, constant_mixing(model, 0))  # type: ignore[arg-type]
    for name, layer in mixture_layers(model).items():
        delta = statics[name].dense()
        factor = share * float(dense_weight(layer.base_layer).norm() / delta.norm())
        layer.tensors("default")["mixture_B"].data.mul_(factor)


def merging(run: Path, out: Path) -> None:
    """Call the verb, telling by a file that signals are handled from here on."""
    from qd2mora.cli.model_verbs import merge
    from qd2mora.stopping import listening

    with listening():
        out.with_suffix(".listening").touch()
        merge(run, out)


def test_a_signal_during_an_export_leaves_all_or_nothing(made: Path, tmp_path: Path) -> None:
    """T1: exit 75 and no folder, or exit 0 and the whole one; the next export is the same as any."""
    run, draw = make_run(made, tmp_path), random.Random(0)
    lengths = []
    for name in ("whole", "again", "once more"):
        process = runs.start(merging, run, tmp_path / name, log=tmp_path / "log")
        wait_for((tmp_path / name).with_suffix(".listening"))
        began = time.monotonic()
        process.join()
        lengths.append(time.monotonic() - began)
        assert process.exitcode == 0, (tmp_path / "log").read_text()
    codes = []
    for number in range(SIGNALS):
        out = tmp_path / f"out{number}"
        process = runs.start(merging, run, out, log=tmp_path / "log")
        wait_for(out.with_suffix(".listening"))
        process.join(draw.uniform(0, 0.9) * min(lengths))
        if process.exitcode is None:
            assert process.pid is not None
            os.kill(process.pid, draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]))
            process.join()
        assert process.exitcode in (0, 75), (tmp_path / "log").read_text()
        assert out.exists() or process.exitcode == 75
        assert not list(tmp_path.glob(".*.partial"))
        if out.exists():
            for name in ("model.safetensors", "config.json"):
                assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
            assert report_of(out) == report_of(tmp_path / "whole")
        codes.append(process.exitcode)
    print(f"T1 exports={SIGNALS} stopped={codes.count(75)}")
    assert 75 in codes


def report_of(export: Path) -> dict[str, object]:
    """Return what an export says of itself, but for how long it took and whether its solution was kept by another."""
    content = json.loads((export / "export_report.json").read_text(encoding="utf-8"))
    content["notes"].pop("kept", None)
    return {name: value for name, value in content.items() if name != "seconds"}


def wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.002)
