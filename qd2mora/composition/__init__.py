"""Composition: adapters out of adapters. Each operation is a small file; what comes out is written as any adapter is.

LoRAs come out as PEFT's own folders, mixtures as this package's. Operations, see their files: cat, linear, lego
(several LoRAs to one), sub (a mixture to a smaller one), upcycle (a LoRA to a mixture), extract (two checkpoints to a
LoRA).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qd2mora.composition import cat, lego, linear, sub
from qd2mora.composition.extract import extract
from qd2mora.composition.inputs import PREFIX, base_of, read_loras, read_mixture, read_weights, trained_on
from qd2mora.composition.learned import learn
from qd2mora.composition.upcycle import upcycle
from qd2mora.disk.durable import save_pretrained
from qd2mora.disk.sealed import seal_folder
from qd2mora.errors import InputRefused, nearest
from qd2mora.merging.lora import write_lora
from qd2mora.merging.shards import File, entry, write_tensors
from qd2mora.mixture import MixtureConfig
from qd2mora.mixture.given import GivenLora
from qd2mora.mixture.low_rank import LowRank
from qd2mora.recipe import load_recipe
from qd2mora.run_folder import is_run, refuse_taken, staged_folder

OPERATIONS = {"cat": "weights learn steps", "linear": "weights", "lego": "weights rank", "sub": "experts rank"}
OPERATIONS |= {"upcycle": "experts", "extract": "rank"}
"""What each operation takes beside its inputs."""
STEPS = 100
NEEDED = {("lego", "rank"), ("upcycle", "experts"), ("extract", "rank")}


@dataclass(frozen=True)
class Composed:
    """What was written, in one line."""

    folder: Path
    words: str


def compose(
    operation: str,
    inputs: Sequence[str],
    out: str | Path,
    *,
    weights: str | None = None,
    rank: int | None = None,
    experts: int | None = None,
    learn_on: str | Path | None = None,
    steps: int | None = None,
) -> Composed:
    """Make one adapter of `inputs` in the new folder `out`, which appears whole or not at all.

    `learn_on`: a recipe, or a run, on whose base and rows the weights of cat are learned, from `weights` on, in
    `steps`.

    Raises InputRefused, DamagedFile, NotFinite.
    """
    settings = {"weights": weights, "rank": rank, "experts": experts, "learn": learn_on, "steps": steps}
    _check(operation, inputs, settings)
    refuse_taken(Path(out), "--out")
    if operation == "extract":
        assert rank is not None
        found = extract(inputs[0], inputs[1], rank)
        words = f"rank {rank} holds {found.energy:.1%} of the difference of {len(found.updates)} linears"
        words += f"; not in it: {', '.join(found.left_out)}" if found.left_out else ""
        with staged_folder(Path(out)) as stage:
            _seal(stage, write_lora(found.updates, inputs[1], None, stage), None)
        return Composed(Path(out), words)
    base = base_of(inputs)
    if operation == "sub":
        return _sub(inputs[0], Path(out), experts, rank)
    loras = read_loras(inputs)
    if operation == "upcycle":
        assert experts is not None
        config, tensors = upcycle(loras[0], experts)
        write_mixture(config, tensors, base, Path(out), trained_on(inputs))
        return Composed(Path(out), f"{config.method}: {experts} experts of rank {config.rank}, the same function")
    given, words = read_weights(weights, len(loras)), ""
    if operation == "lego":
        assert rank is not None
        made = lego.compose(loras, given, rank)
    elif learn_on is not None:
        made, words = _learned(loras, given, base, Path(learn_on), STEPS if steps is None else steps)
    else:
        made = {"cat": cat, "linear": linear}[operation].compose(loras, given)
    with staged_folder(Path(out)) as stage:
        _seal(stage, write_lora(made, base, None, stage), trained_on(inputs))
    return Composed(Path(out), f"{len(loras)} LoRAs, rank {max(each.rank for each in made.values())}{words}")


def _learned(
    loras: Sequence[GivenLora], given: Sequence[float], base: str, where: Path, steps: int
) -> tuple[dict[str, LowRank], str]:
    """Return CAT with weights learned on the rows of a recipe, or of a run's, and what that was worth."""
    recipe = load_recipe(where / "recipe.yaml" if is_run(where) else where)
    found = learn(loras, given, base, recipe, steps)
    words = f"; on {found.rows} calibration rows loss {found.loss_given:.4f} -> {found.loss:.4f}"
    return cat.compose(loras, found.weights), words


def _sub(folder: str, out: Path, experts: int | None, rank: int | None) -> Composed:
    config, linears = read_mixture(folder)
    assert config.rank is not None
    experts, rank = experts or config.num_down, rank or config.rank
    sub.refuse_unfit(config, experts, rank)
    tensors = {
        f"{name}.{kind}": tensor
        for name, each in linears.items()
        for kind, tensor in sub.compress(each, experts, rank).items()
    }
    made = sub.compressed_config(config, experts, rank)
    write_mixture(made, tensors, base_of([folder]), out, trained_on([folder]))
    return Composed(out, f"{config.num_down} experts of rank {config.rank} became {experts} of rank {rank}")


def write_mixture(
    config: MixtureConfig, tensors: Mapping[str, Tensor], base: str, out: Path, settings: dict[str, Any] | None = None
) -> None:
    """Write an adapter of this package, which loads with `import qd2mora; PeftModel.from_pretrained`.

    `settings`: the base with its quantisation, where it is known.
    """
    config.base_model_name_or_path, config.inference_mode = base, True
    with staged_folder(out) as stage:
        save_pretrained(config, stage)
        entries = [entry(PREFIX + name, tensor.contiguous()) for name, tensor in tensors.items()]
        _seal(stage, [write_tensors(stage / "adapter_model.safetensors", entries)], settings)


def _seal(folder: Path, files: list[File], settings: dict[str, Any] | None) -> None:
    """Write the manifest; with the base that was trained on, `generate` loads it quantised as it was."""
    known = {file.name: (file.num_bytes, file.sha256) for file in files}
    for path in folder.iterdir():
        if path.name not in known:
            content = path.read_bytes()
            known[path.name] = (len(content), hashlib.sha256(content).hexdigest())
    seal_folder(folder, known, {"kind": "composed"} | ({"base": settings} if settings else {}))


def _check(operation: str, inputs: Sequence[str], settings: Mapping[str, object]) -> None:
    if operation not in OPERATIONS:
        raise InputRefused(f"compose: unknown '{operation}'; {nearest(operation, OPERATIONS)}")
    takes = OPERATIONS[operation].split()
    for key, value in settings.items():
        if value is not None and key not in takes:
            raise InputRefused(f"--{key}: {operation} takes none; it takes {' and '.join(takes)}")
        if value is None and (operation, key) in NEEDED:
            raise InputRefused(f"--{key}: {operation} needs it, a whole number")
    if settings["steps"] is not None and settings["learn"] is None:
        raise InputRefused("--steps: nothing learns; name a recipe with --learn")
    wanted = {"sub": 1, "upcycle": 1, "extract": 2}.get(operation)
    if wanted is not None and len(inputs) != wanted:
        what = "the tuned model and its base" if operation == "extract" else "one adapter"
        raise InputRefused(f"compose {operation} takes {what}, {len(inputs)} given")


__all__ = ["OPERATIONS", "Composed", "compose", "write_mixture"]
