"""P1, V1, Y1, BM1: hostile files in every place that a model, an adapter or a run is loaded from."""

import io
import itertools
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forked import Outcome, Result, run

MARKER = "CANARY"


class _Payload:
    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call, self.arguments


def payloads(canary: Path) -> dict[str, bytes]:
    """Return 60 files that leave `canary` behind where anything runs them."""
    touch = f"touch {canary}"
    bare = {
        f"{name}, protocol {protocol}": pickle.dumps(payload, protocol)
        for name, payload in {
            "os.system": _Payload(os.system, touch),
            "eval": _Payload(eval, f"open({str(canary)!r}, 'w')"),
            "exec": _Payload(exec, f"open({str(canary)!r}, 'w')"),
            "open": _Payload(open, str(canary), "w"),
        }.items()
        for protocol in range(6)
    }
    some = list(bare.values())[2::6]
    made = {}
    for number, content in enumerate(some):
        made[f"zip {number}"] = _zipped(content)
        damaged = bytearray(_zipped(content))
        damaged[14:18] = b"\0\0\0\0"
        made[f"zip with a wrong sum {number}"] = bytes(damaged)
        made[f"picture {number}"] = b"\x89PNG\r\n\x1a\n" + content
        made[f"7z {number}"] = b"7z\xbc\xaf'\x1c" + content
        made[f"gzip {number}"] = b"\x1f\x8b\x08" + content
        made[f"tar {number}"] = _tarred(content)
        made[f"safetensors with a tail {number}"] = _safetensors() + content
        made[f"safetensors as data {number}"] = _safetensors(content)
    made["a program"] = f"#!/bin/sh\n{touch}\n".encode()
    made["python"] = f"import os; os.system({touch!r})\n".encode()
    made["yaml"] = f"!!python/object/apply:os.system ['{touch}']\n".encode()
    made["an ELF"] = b"\x7fELF" + bytes(100)
    return bare | made


def _zipped(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return buffer.getvalue()


def _tarred(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("pickle")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _safetensors(data: bytes = b"\0" * 16) -> bytes:
    header = json.dumps({"x": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


SLOTS = [
    *("base/model.safetensors", "base/config.json", "base/generation_config.json", "base/tokenizer.json"),
    *("base/tokenizer_config.json", "base/special_tokens_map.json", "base/tokenizer.model", "base/chat_template.jinja"),
    *("base/model.safetensors.index.json", "base/pytorch_model.bin", "run/adapter/adapter_model.safetensors"),
    *("run/adapter/adapter_config.json", "run/adapter/adapter_model.bin", "run/recipe.yaml", "data/first.jsonl"),
    *("data/first.csv", "data/first.parquet", "run/tokenizer.json"),
]
# Removed with a slot, so that what stands in it is what would be read.
_INSTEAD = {
    "base/pytorch_model.bin": "base/model.safetensors",
    "base/model.safetensors.index.json": "base/model.safetensors",
    "run/adapter/adapter_model.bin": "run/adapter/adapter_model.safetensors",
}


def copied(made: Path, folder: Path) -> Path:
    """Copy a finished run with its base and data; the recipe in the run names the copy's base."""
    case = folder / "case"
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(made, case)
    recipe = case / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace(str(made), str(case)), encoding="utf-8")
    return case


def opening(case: Path, data: str = "data/first.jsonl") -> Outcome:
    """Open base, tokenizer, adapter and data of a copied run in a fork, as every verb does."""

    def action() -> None:
        from qd2mora.base import load_tokenizer
        from qd2mora.data import read_pairs
        from qd2mora.errors import StopError
        from qd2mora.recipe import Task
        from qd2mora.run_folder import open_run

        try:
            open_run(case / "run")
            load_tokenizer(str(case / "base"))
            read_pairs(Task(name="t", path=str(case / data)), str(case / data))
        except StopError as error:
            import sys

            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)

    return run(action, marker=MARKER)


def gate_payloads(made: Path, folder: Path, slots: int) -> Result:
    """P1: every payload in `slots` places each; nothing runs, nothing is imported, no program is started."""
    result = Result("P1")
    canary = folder / MARKER
    control = run(lambda: pickle.loads(pickle.dumps(_Payload(open, str(canary), "w"))), marker=MARKER)
    result.check(bool(control.events) and canary.exists(), "the watch sees nothing")
    canary.unlink(missing_ok=True)
    clean = opening(copied(made, folder))
    result.check(clean.code == 0 and not clean.events, f"a clean run: {clean}")
    for slot in ("base/model.safetensors", "run/adapter/adapter_model.safetensors"):
        case = copied(made, folder)
        (case / slot).write_bytes(payloads(canary)["zip 0"])
        outcome = opening(case)
        named = "is a zip archive" in outcome.err and "safe_serialization=True" in outcome.err
        result.check(named and outcome.code == 2 and not outcome.events, f"a zip in {slot} is not named: {outcome}")
    rotation = itertools.cycle(SLOTS)
    for name, content in payloads(canary).items():
        for _ in range(slots):
            slot = next(rotation)
            case = copied(made, folder)
            (case / _INSTEAD.get(slot, slot)).unlink(missing_ok=True)
            (case / slot).write_bytes(content)
            outcome = opening(case, slot if slot.startswith("data") else "data/first.jsonl")
            answered = outcome.code in (2, 6) and outcome.is_one_error_line
            unread = outcome.code == 0 and slot.endswith(("tokenizer.model", "jinja", "special_tokens_map.json"))
            inert = not outcome.events and not canary.exists()
            result.check(inert and (answered or unread), f"{name} in {slot}: {outcome}")
            canary.unlink(missing_ok=True)
        next(rotation)
    result.numbers["payloads"] = len(payloads(canary))
    return result


NAMES: list[Any] = [
    *("../{m}.safetensors", "../../{m}.safetensors", "/{m}.safetensors", "/etc/{m}.safetensors", "..", ".", "/"),
    *("sub/{m}.safetensors", "sub/../../{m}.safetensors", "..\\{m}.safetensors", "C:\\{m}.safetensors", "~/{m}"),
    *(
        "file:///{m}.safetensors",
        "https://host/{m}.safetensors",
        "%2e%2e/{m}.safetensors",
        "\uff0e\uff0e/{m}.safetensors",
    ),
    *("‥/{m}.safetensors", "{m}\0.safetensors", "\0", "{m}\n.safetensors", "{m}\r.safetensors", " ", ""),
    *(".{m}.safetensors", "-{m}.safetensors", "a" * 300 + ".safetensors", "é{m}.safetensors", "\u202e{m}.safetensors"),
    *("/dev/zero", "/proc/self/environ", "{m}.bin", "{m}.pt", "model.safetensors/../../{m}.safetensors"),
    *("./model.safetensors", "$HOME/{m}.safetensors", "`{m}`.safetensors", "{m};x.safetensors", "{m} x.safetensors"),
    *("{m}|x.safetensors", "{m}*.safetensors", "{m}?.safetensors", "hub:{m}/x", "{m}//x.safetensors", "..;/{m}"),
    *(5, True, [["../{m}"]], {"a": "../{m}"}, "\ud800{m}.safetensors", "\u2215{m}.safetensors", "\uff0esafetensors"),
]
_LINKED = ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]


BELOW = "index: a name in a folder below"
ALWAYS = ("link base/model.safetensors", "link run/adapter", BELOW)


def gate_names(made: Path, folder: Path, step: int = 1) -> Result:
    """V1: names that lead out of the folder, links, pipes and devices; every `step`-th case."""
    result = Result("V1")
    for number, (label, prepare) in enumerate(_name_cases(folder)):
        if number % step and not label.startswith(ALWAYS):
            continue
        case = copied(made, folder)
        (folder / f"{MARKER}.safetensors").write_bytes((made / "base" / "model.safetensors").read_bytes())
        prepare(case)
        outcome = opening(case)
        held = outcome.code in (2, 6) and outcome.is_one_error_line and not outcome.events and outcome.cpu_s < 20
        if label == BELOW:  # by its name, not because something else is missing
            held = held and "only safetensors files beside it are read" in outcome.err
        result.check(held, f"{label}: {outcome}")
    return result


def _name_cases(folder: Path) -> list[tuple[str, Callable[[Path], None]]]:
    cases: list[tuple[str, Callable[[Path], None]]] = []
    for name in NAMES:
        named = name.replace("{m}", MARKER) if isinstance(name, str) else name
        cases.append((f"index: {name!r}", lambda case, named=named: _index(case, named)))
        for file, key in (
            ("tokenizer_config.json", "vocab_file"),
            ("tokenizer_config.json", "tokenizer_file"),
            ("config.json", "transformers_weights"),
        ):
            if named not in (True, "model.safetensors") and not (isinstance(named, str) and named in ("{m}.bin",)):
                cases.append((f"{key}: {name!r}", lambda case, f=file, k=key, n=named: _set(case / "base" / f, {k: n})))
    outside = folder / f"{MARKER}.safetensors"
    places = [f"base/{name}" for name in _LINKED] + [f"run/adapter/{name}" for name in os_adapter_files()]
    for place in places:
        for target in (outside, Path("/dev/zero"), Path("/proc/self/environ"), folder / "nowhere"):
            cases.append((f"link {place} to {target}", lambda case, p=place, t=target: _link(case / p, t)))
        cases.append((f"a pipe as {place}", lambda case, p=place: _replace(case / p, os.mkfifo)))
        cases.append((f"a folder as {place}", lambda case, p=place: _replace(case / p, os.mkdir)))
    return [each for each in cases if not each[0].endswith((f"'{MARKER}.bin'", "'{m}.bin'", "'{m}.pt'"))] + [
        ("index: a pickle", lambda case: _index(case, f"{MARKER}.bin")),
        (BELOW, _index_below),
        ("index: a checkpoint", lambda case: _index(case, f"{MARKER}.pt")),
    ]


def os_adapter_files() -> tuple[str, str]:
    return "adapter_model.safetensors", "adapter_config.json"


def _index(case: Path, name: object) -> None:
    (case / "base" / "model.safetensors").unlink()
    content = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}
    (case / "base" / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")


def _index_below(case: Path) -> None:
    """Shards in a folder of their own would load: what is read must be where the checks look."""
    (case / "base" / "below").mkdir()
    shutil.copy(case / "base" / "model.safetensors", case / "base" / "below")
    _index(case, "below/model.safetensors")


def _set(path: Path, changes: dict[str, object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content), encoding="utf-8")


def _replace(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


def _link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


_EVIL = "canary_module.Class"
TRICKS: list[tuple[str, dict[str, Any]]] = [
    *[
        ("base/config.json", {"auto_map": {kind: _EVIL}})
        for kind in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    ],
    ("base/config.json", {"auto_map": {"AutoModelForCausalLM": f"owner/repo--{_EVIL}"}, "model_type": "new"}),
    *[("base/config.json", {key: _EVIL}) for key in ("_target_", "_component_", "custom_generate", "__reduce__")],
    *[("base/config.json", {"rope_parameters": {key: _EVIL}}) for key in ("_target_", "auto_map")],
    ("base/config.json", {"trust_remote_code": True}),
    ("base/config.json", {"custom_pipelines": {"x": {"impl": _EVIL}}}),
    *[("base/config.json", {key: "owner/kernel:fn"}) for key in ("attn_implementation", "_attn_implementation")],
    ("base/config.json", {"_experts_implementation": "owner/kernel"}),
    ("base/config.json", {"model_type": _EVIL}),
    ("base/config.json", {"hidden_act": "__import__('os')"}),
    ("base/config.json", {"dtype": "load"}),
    ("base/config.json", {"kernel_config": {"kernel_mapping": {"RMSNorm": "owner/kernel:fn"}}}),
    *[
        ("base/config.json", {"quantization_config": {"quant_method": kind}})
        for kind in ("gptq", "quark", "hqq", _EVIL)
    ],
    *[
        ("base/tokenizer_config.json", {"auto_map": {"AutoTokenizer": value}})
        for value in ([_EVIL, None], [None, _EVIL])
    ],
    ("base/tokenizer_config.json", {"tokenizer_class": _EVIL, "auto_map": {"AutoTokenizer": [_EVIL, _EVIL]}}),
    ("base/tokenizer_config.json", {"vocab_file": ".env/../../x"}),
    ("base/tokenizer_config.json", {"_target_": _EVIL}),
    ("base/generation_config.json", {"custom_generate": "owner/repo"}),
    ("base/generation_config.json", {"_target_": _EVIL}),
    ("base/adapter_config.json", {"base_model_name_or_path": "../elsewhere", "peft_type": "LORA"}),
    ("run/adapter/adapter_config.json", {"auto_mapping": {"base_model_class": "Class", "parent_library": "canary"}}),
    *[("run/adapter/adapter_config.json", {"peft_type": kind}) for kind in ("LORA", "CORDA", "EVA", "X", None, 5)],
    *[("run/adapter/adapter_config.json", {key: "(a+)+$"}) for key in ("target_modules", "exclude_modules")],
    *[
        ("run/recipe.yaml", {"text": text})
        for text in ("base: !!python/name:os.system", "_target_: os.system", "<<: {}")
    ],
    ("run/recipe.yaml", {"text": "base: {model: x, trust_remote_code: true}"}),
]


def gate_tricks(made: Path, folder: Path, step: int = 1) -> Result:
    """Y1: configs that would have a library import, fetch or open something."""
    result = Result("Y1")
    for slot, changes in TRICKS[::step]:
        case = copied(made, folder)
        if "text" in changes:
            (case / slot).write_text(changes["text"], encoding="utf-8")
        elif (case / slot).exists():
            _set(case / slot, changes)
        else:
            (case / slot).write_text(json.dumps(changes), encoding="utf-8")
        outcome = opening(case)
        held = outcome.code in (2, 6) and outcome.is_one_error_line and not outcome.events
        if slot == "base/adapter_config.json":  # else another base would be loaded, from where the file says
            held = held and "holds an adapter" in outcome.err
        if slot == "run/adapter/adapter_config.json":  # before the seal is looked at: a resealed one is no better
            said = {"target_modules": "is a pattern", "exclude_modules": "is a pattern", "peft_type": "peft_type is"}
            wanted = said.get(next(iter(changes)), "")
            held = held and (wanted in outcome.err or changes.get("peft_type") == "LORA")
        key = next(iter(changes))
        if "implementation" in key:  # by us, and not by a library that happens to have no such package
            held = held and "asks for a kernel from elsewhere" in outcome.err
        if key == "quantization_config":
            held = held and "name the 16-bit model" in outcome.err
        result.check(held, f"{slot} {changes}: {outcome}")
    return result
