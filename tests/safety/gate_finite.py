"""NF1: a number that is not finite in any tensor that a verb reads is refused by name; nothing is left."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import tiny
import torch
import yaml
from forked import Result, command, run
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

NUMBERS = (math.nan, math.inf, -math.inf)


def gate(made: Path, folder: Path, step: int) -> Result:
    """Put each number into a tensor of each adapter and model that verbs read, and ask every verb that reads it."""
    result = Result("NF1")
    whole = made_whole(made, folder / "whole")
    for number, (place, verb) in enumerate(_cases()):
        if number % step and place != "exact":
            continue
        case = folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(whole, case)
        name_own_folders(case, whole)
        name = _spoilt(case / place, NUMBERS[number % 3], number)
        before = _all_files(case)
        outcome = run(command(*_arguments(verb, case, place)), limit_s=120)
        is_refused = outcome.code == 2 and outcome.is_one_error_line and name in outcome.err
        result.check(is_refused and _all_files(case) == before, f"{verb} {place} {name}: {outcome}")
    _too_large(whole, folder, result)
    return result


def _cases() -> Iterator[tuple[str, str]]:
    for adapter in ("lora", "pairs"):
        yield from ((adapter, verb) for verb in ("generate", "eval"))
    yield from (("lora", verb) for verb in ("cat", "linear", "lego", "upcycle", "train"))
    yield "pairs", "sub"
    for verb in ("generate", "eval", "merge"):
        yield "run/adapter", verb
        yield "base", verb
    yield from (("base", "begin"), ("base", "extract"), ("tuned", "extract"), ("exact", "generate"), ("exact", "eval"))


def _arguments(verb: str, case: Path, place: str) -> list[str]:
    asked = {"run/adapter": case / "run", "base": case / "run"}.get(place, case / place)
    compose = {
        "cat": [case / "lora", case / "lora2", "--weights", "2,1"],
        "linear": [case / "lora", case / "lora2", "--weights", "2,1"],
        "lego": [case / "lora", case / "lora2", "--rank", 4],
        "upcycle": [case / "lora", "--experts", 2],
        "sub": [case / "pairs", "--experts", 1],
        "extract": [case / "tuned", case / "base", "--rank", 2],
    }
    if verb in compose:
        return ["compose", verb, *map(str, compose[verb]), "--out", str(case / f"out-{verb}")]
    recipe, output = str(case / "recipe.yaml"), f"output={case / 'new'}"
    lora = ["adapter.method=cat", "adapter.rank=null", "adapter.alpha=null", "adapter.targets=null"]
    return {
        "generate": ["generate", str(asked), "--prompt", "x", "--max-new-tokens", "1"],
        "eval": ["eval", str(asked), "--recipe", recipe, "--limit", "2"],
        "merge": ["merge", str(asked), "--out", str(case / "out")],
        "begin": ["train", recipe, output, "train.steps=1"],
        "train": [
            "train",
            recipe,
            output,
            "train.steps=1",
            *lora,
            f"adapter.adapters=[{case / 'lora'}, {case / 'lora2'}]",
        ],
    }[verb]


def made_whole(made: Path, whole: Path) -> Path:
    """Make, beside a copy of the finished run, two LoRAs, a mixture of pairs, a tuned base and an exact export."""
    shutil.copytree(made, whole)
    name_own_folders(whole, made)
    for seed, name in enumerate(("lora", "lora2")):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(whole / "base"), config).save_pretrained(whole / name)
    tiny.save_base(whole / "tuned", seed=1)
    for arguments in (
        ("compose", "upcycle", whole / "lora", "--experts", 2, "--out", whole / "pairs"),
        ("merge", whole / "run", "--to", "exact", "--out", whole / "exact"),
    ):
        outcome = run(command(*arguments), limit_s=120)
        assert outcome.code == 0, outcome
    return whole


def name_own_folders(case: Path, before: Path) -> None:
    """Let every recipe and configuration of a copy name the copy's own folders."""
    for path in (case / "recipe.yaml", case / "run/recipe.yaml", *case.glob("*/adapter_config.json")):
        path.write_text(path.read_text(encoding="utf-8").replace(str(before), str(case)), encoding="utf-8")
    assert yaml.safe_load((case / "recipe.yaml").read_text())["base"]["model"] == str(case / "base")


def _spoilt(folder: Path, value: float, number: int) -> str:
    """Put one number into one tensor of a folder's weights, as a stranger would have made them; return its name."""
    path = next(iter(sorted(folder.glob("*.safetensors"))))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    names = sorted(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel())
    name = names[number % len(names)]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, metadata=metadata)
    sealed_anew(folder)
    return name


def sealed_anew(folder: Path) -> None:
    """Make the manifest again, as any stranger can."""
    from qd2mora.disk.file_hash import size_and_hash
    from qd2mora.disk.sealed import MANIFEST, seal_text, unseal_text

    if not (folder / MANIFEST).is_file():
        return
    manifest = unseal_text((folder / MANIFEST).read_bytes(), "")
    for name in manifest["files"]:
        size, digest = size_and_hash(folder / name)
        manifest["files"][name] = {"bytes": size, "sha256": digest}
    (folder / MANIFEST).write_text(seal_text(manifest), encoding="utf-8")


def _all_files(case: Path) -> set[str]:
    names = {path.relative_to(case).as_posix() for path in case.rglob("*") if path.is_file()}
    return {name for name in names if "quantised" not in name and not name.endswith("LOCK")}


def _too_large(whole: Path, folder: Path, result: Result) -> None:
    """Finite numbers whose products are not: the result is refused, and nothing is left."""
    case = folder / "large"
    shutil.copytree(whole, case)
    name_own_folders(case, whole)
    path = case / "lora/adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: torch.full_like(tensor, 3e38) for name, tensor in tensors.items()}, path, {"format": "pt"})
    for verb in ("cat", "linear", "lego", "upcycle", "generate", "eval"):
        outcome = run(command(*_arguments(verb, case, "lora")), limit_s=60)
        is_refused = (
            outcome.code == 4 and outcome.err.splitlines()[-1].startswith("error: ") and not outcome.out.strip()
        )
        result.check(is_refused and not (case / f"out-{verb}").exists(), f"{verb} of numbers too large: {outcome}")


__all__ = ["gate", "made_whole", "name_own_folders", "sealed_anew"]
