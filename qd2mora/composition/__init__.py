"""Composition: adapters out of adapters. Each operation is a small file; what comes out is written as any adapter is.

LoRAs come out as PEFT's own folders, mixtures as this package's. Operations, see their files: cat, linear, lego
(several LoRAs to one), average (several FlyLoRAs to one), sub (a mixture to a smaller one), upcycle (a LoRA
to a mixture), fit_router (several LoRAs to a mixture), experts (a mixture with others, fewer, or smaller ones),
gated_ranks (fewer ranks), extract
(two checkpoints to a LoRA), imagine (several tasks' cores to those of another).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from qd2mora.base import load_tokenizer
from qd2mora.composition import cat, experts, lego, linear, sub_moe
from qd2mora.composition.average import average
from qd2mora.composition.calibration import ROWS, sampled
from qd2mora.composition.expert_use import ExpertUse, measured_use
from qd2mora.composition.extract import extract
from qd2mora.composition.fit_router import fit_router
from qd2mora.composition.gated_ranks import pruned_ranks
from qd2mora.composition.imagine import imagine
from qd2mora.composition.inputs import (
    Settings,
    base_of,
    is_mixture,
    read_loras,
    read_mixture,
    read_weights,
    trained_on,
)
from qd2mora.composition.learned import learn
from qd2mora.composition.shortlist import read_descriptions, shortlisted
from qd2mora.composition.upcycle import upcycle
from qd2mora.disk.durable import save_pretrained
from qd2mora.disk.file_hash import SizeAndHash
from qd2mora.disk.sealed import seal_whole_folder
from qd2mora.disk.staged import staged_folder
from qd2mora.disk.tensor_file import is_finite, tensor_at_hand, write_tensors
from qd2mora.errors import InputRefused, NotFinite, nearest
from qd2mora.merging.lora import WEIGHTS, write_lora
from qd2mora.mixture import MixtureConfig
from qd2mora.mixture.low_rank import LowRank
from qd2mora.mixture.registration import MODEL_PREFIX
from qd2mora.mixture.trained_loras import TrainedLora
from qd2mora.recipe import Recipe, load_recipe
from qd2mora.run_folder import is_run
from qd2mora.safekeeping.places import taken

STEPS = 100
"""Of `learn`, where none are given."""


@dataclass(frozen=True)
class ComposeOptions:
    """What operations take beside their inputs.

    learn: a recipe, or a run, on whose base and rows the weights of cat are learned, from `weights` on, in `steps`.
    on: a recipe, or a run, on whose rows sub measures how much each expert is used, fit-router fits, or for whose
    task imagine makes cores. router: what that fits, lsq or prototype. describe: a file with a text on each
    adapter, of which the nearest `keep` are taken. expert: numbers of experts to leave out, with commas. energy:
    the share of each expert's update that its rank must keep.
    """

    weights: str | None = None
    rank: int | None = None
    experts: int | None = None
    learn: str | Path | None = None
    steps: int | None = None
    on: str | Path | None = None
    router: str | None = None
    describe: Path | None = None
    keep: int | None = None
    expert: str | None = None
    energy: float | None = None


@dataclass(frozen=True)
class Composed:
    """What was written, in one line."""

    folder: Path
    words: str


@dataclass(frozen=True)
class Operation:
    """One way to make an adapter: `make` writes it into a folder and says in words what it is.

    takes, needs: names of options; inputs: what it takes, where that is not any number of adapters. distinct: the same
    one twice would count as two things that it is not.
    """

    make: Callable[[Sequence[str], ComposeOptions, Path], str]
    takes: tuple[str, ...]
    needs: tuple[str, ...] = ()
    num_inputs: int | None = None
    inputs: str = "one adapter"
    distinct: bool = False


def compose(operation: str, inputs: Sequence[str], out: str | Path, options: ComposeOptions | None = None) -> Composed:
    """Make one adapter of `inputs` in the new folder `out`, which appears whole or not at all.

    Raises InputRefused, DamagedFile, NotFinite.
    """
    options = options or ComposeOptions()
    _check(operation, inputs, options)
    with taken(Path(out), "--out") as target, staged_folder(target) as stage:
        words = OPERATIONS[operation].make(inputs, options, stage)
    return Composed(Path(out), words)


def _cat(inputs: Sequence[str], options: ComposeOptions, stage: Path) -> str:
    loras, given = _weighed(inputs, options)
    if options.learn is None:
        return _write_sum(cat.compose(loras, given), inputs, stage)
    steps = STEPS if options.steps is None else options.steps
    found = learn(loras, given, base_of(inputs), recipe_of(options.learn), steps)
    words = _write_sum(cat.compose(loras, found.weights), inputs, stage)
    return f"{words}; on {found.rows} calibration rows loss {found.loss_given:.4f} -> {found.loss:.4f}"


def _average(inputs: Sequence[str], options: ComposeOptions, stage: Path) -> str:
    base = base_of(inputs)
    found = average(inputs, read_weights(options.weights, len(inputs)))
    write_mixture(found.config, found.tensors, base, stage, trained_on(inputs))
    words = f"adapters of one frozen A: {len(inputs)}"
    if found.bias_spread:
        return f"{words}; their selection biases differ by up to {found.bias_spread:.2g}, their mean chooses"
    return f"{words}, exact"


def _linear(inputs: Sequence[str], options: ComposeOptions, stage: Path) -> str:
    return _write_sum(linear.compose(*_weighed(inputs, options)), inputs, stage)


def _lego(inputs: Sequence[str], options: ComposeOptions, stage: Path) -> str:
    assert options.rank is not None
    return _write_sum(lego.compose(*_weighed(inputs, options), options.rank), inputs, stage)


def _weighed(inputs: Sequence[str], options: ComposeOptions) -> tuple[list[TrainedLora], list[float]]:
    """Return LoRAs of one base, and a weight for each. Raises InputRefused."""
    base_of(inputs)
    loras = read_loras(inputs)
    return loras, read_weights(options.weights, len(loras))


def _write_sum(made: dict[str, LowRank], inputs: Sequence[str], stage: Path) -> str:
    _seal(stage, write_lora(made, base_of(inputs), None, stage), trained_on(inputs))
    return f"LoRAs: {len(inputs)}, rank {max(each.rank for each in made.values())}"


def _extract(inputs: Sequence[str], options: ComposeOptions, stage: Path) -> str:
    assert options.rank is not None
    tuned, base = inputs
    found = extract(tuned, base, options.rank)
    _seal(stage, write_lora(found.updates, base, None, stage), None)
    words = f"rank {options.rank} holds {found.energy:.1%} of the difference of {len(found.updates)} linears"
    if found.left_out:
        words += f"; not in it: {', '.join(found.left_out)}"
    return words


def _upcycle(inputs: Sequence[str], options: ComposeOptions, stage: Path) -> str:
    assert options.experts is not None
    base, (lora,) = base_of(inputs), read_loras(inputs)
    config, tensors = upcycle(lora, options.experts)
    write_mixture(config, tensors, base, stage, trained_on(inputs))
    return f"{config.method}: {options.experts} experts of rank {config.rank}, the same function"


def _sub(inputs: Sequence[str], options: ComposeOptions, stage: Path) -> str:
    base, (folder,) = base_of(inputs), inputs
    config, linears = read_mixture(folder)
    assert config.rank is not None
    number, rank = options.experts or config.num_down, options.rank or config.rank
    sub_moe.refuse_unfit(config, number, rank)
    use = None if options.on is None else measured_use(folder, recipe_of(options.on))
    try:
        for name, each in linears.items():
            experts.refuse_lacking(config, name, each)
        tensors = {
            f"{name}.{kind}": tensor
            for name, each in linears.items()
            for kind, tensor in sub_moe.compress(each, number, rank, _shares(use, name)).items()
        }
    except (LookupError, ValueError, RuntimeError) as error:
        raise InputRefused(f"'{folder}' does not hold the tensors that its config asks for: {error}") from error
    write_mixture(sub_moe.compressed_config(config, number, rank), tensors, base, stage, trained_on(inputs))
    words = f"{config.num_down} experts of rank {config.rank} became {number} of rank {rank}"
    if use is None:
        return f"{words}; all weighed alike: --on RECIPE weighs them by their use on its rows"
    return f"{words}; weighed by their use on {use.rows} rows"


def _add_expert(inputs: Sequence[str], options: ComposeOptions, stage: Path) -> str:
    base, (folder, *others) = base_of(inputs), inputs
    if not others:
        raise InputRefused("compose add-expert takes a mixture and what is added to it, one given")
    mixture = _cut("add-expert", folder)
    found = [_cut("add-expert", each) if is_mixture(each) else read_loras([each])[0] for each in others]
    words = _write_experts(*experts.added(mixture, found), base, inputs, stage)
    if any(not is_mixture(each) for each in others):
        return f"{words}; LoRAs have no router's row: theirs are zero until they are trained (adapter.start)"
    return f"{words}, each with its router's row"


def _drop_expert(inputs: Sequence[str], options: ComposeOptions, stage: Path) -> str:
    assert options.expert is not None
    try:
        numbers = [int(part) for part in options.expert.split(",")]
    except ValueError:
        raise InputRefused(f"--expert: '{options.expert}' will not do: numbers of experts, such as 1,3") from None
    mixture = _cut("drop-expert", inputs[0])
    return _write_experts(*experts.dropped(mixture, numbers), base_of(inputs), inputs, stage)


def _pick_ranks(inputs: Sequence[str], options: ComposeOptions, stage: Path) -> str:
    assert options.energy is not None
    mixture = _cut("pick-ranks", inputs[0])
    config, linears, kept = experts.picked(mixture, options.energy, options.rank)
    words = _write_experts(config, linears, base_of(inputs), inputs, stage)
    return f"{words}; {kept:.2%} of the updates' energy is kept"


def _cut(operation: str, folder: str) -> experts.Mixture:
    try:
        return experts.cut(operation, *read_mixture(folder))
    except (LookupError, ValueError, RuntimeError) as error:
        raise InputRefused(f"'{folder}' does not hold the tensors that its config asks for: {error}") from error


def _write_experts(
    config: MixtureConfig, linears: experts.Linears, base: str, inputs: Sequence[str], stage: Path
) -> str:
    tensors = {f"{name}.{kind}": tensor for name, each in linears.items() for kind, tensor in each.items()}
    write_mixture(config, tensors, base, stage, trained_on(inputs))
    ranks = config.ranks or [config.rank or 0] * config.num_down
    return f"{config.method}: {len(ranks)} experts of ranks {', '.join(map(str, ranks))}"


def _prune(inputs: Sequence[str], options: ComposeOptions, stage: Path) -> str:
    assert options.experts is not None
    (folder,), number = inputs, options.experts
    config, linears = read_mixture(folder)
    is_of_ranks = "rank" in config.routers
    mixture = None if is_of_ranks else _cut("prune", folder)
    if options.on is not None and "down" in config.routers and config.routers["down"].input == "none":
        raise InputRefused(f"--on: the gate of {config.method} reads no row; leave it out")
    use = None if options.on is None else measured_use(folder, recipe_of(options.on))
    if mixture is None:
        left = pruned_ranks(config, linears, number, lambda name: _shares(use, name))
    else:
        left = experts.pruned(mixture, number, lambda name: _shares(use, name))
    _write_experts(left.config, left.linears, base_of(inputs), inputs, stage)
    what = f"{config.rank} ranks" if is_of_ranks else f"{config.num_down} experts"
    words = (
        f"{what} became {number}; those left out did {sum(left.lost) / len(left.lost):.2%} of what all do, "
        f"in one linear up to {max(left.lost):.2%}"
    )
    if use is None:
        return f"{words}; by their size alone"
    return f"{words}; by their size and their use on {use.rows} rows"


def _imagine(inputs: Sequence[str], options: ComposeOptions, stage: Path) -> str:
    assert options.on is not None
    base, recipe = base_of(inputs), recipe_of(options.on)
    found = imagine(inputs, base, recipe)
    write_mixture(found.config, found.tensors, base, stage, trained_on(inputs))
    return (
        f"experimental: cores of {found.config.method} for rows that it was not trained on, from {len(inputs)} tasks; "
        f"those of the given tasks come back within {found.error:.1%}; the rows are nearest to '{found.nearest}', and "
        f"{found.outside:.0%} of how they differ from the mean task is like none of them"
    )


def _fit_router(inputs: Sequence[str], options: ComposeOptions, stage: Path) -> str:
    assert options.on is not None
    base, recipe, kind = base_of(inputs), recipe_of(options.on), options.router or "lsq"
    chosen = _shortlisted(inputs, recipe, options)
    found = fit_router(chosen, base, recipe, kind)
    write_mixture(found.config, found.tensors, base, stage, recipe.base.model_dump())
    words = (
        f"{found.config.num_down} experts, one a prompt; rows of each: {', '.join(map(str, found.rows))}; loss a token "
        f"{found.routed:.4f}, the best expert alone {found.single:.4f}, each row its own best {found.own:.4f}"
    )
    if len(chosen) < len(inputs):
        return f"{words}; by their descriptions {', '.join(chosen)} of {len(inputs)} adapters"
    return words


def _shortlisted(inputs: Sequence[str], recipe: Recipe, options: ComposeOptions) -> list[str]:
    if (options.describe is None) != (options.keep is None):
        raise InputRefused("--describe, --keep: go together: texts on the adapters, and how many are taken")
    if options.describe is None or options.keep is None:
        return list(inputs)
    tokenizer = load_tokenizer(recipe.base.model)
    if options.keep > len(inputs):
        raise InputRefused(f"--keep: {options.keep} of {len(inputs)} inputs; take fewer, or leave --keep out")
    descriptions = read_descriptions(options.describe, inputs)
    return shortlisted(descriptions, sampled(recipe, tokenizer, ROWS), tokenizer, options.keep)


def _shares(use: ExpertUse | None, linear: str) -> Tensor | None:
    return None if use is None else use.shares[linear]


def recipe_of(path: str | Path) -> Recipe:
    """Read a recipe's file, or a run's. Raises InputRefused."""
    return load_recipe(Path(path) / "recipe.yaml" if is_run(path) else Path(path))


OPERATIONS = {
    "cat": Operation(_cat, ("weights", "learn", "steps")),
    "linear": Operation(_linear, ("weights",)),
    "average": Operation(_average, ("weights",)),
    "lego": Operation(_lego, ("weights", "rank"), needs=("rank",)),
    "sub": Operation(_sub, ("experts", "rank", "on"), num_inputs=1),
    "prune": Operation(_prune, ("experts", "on"), needs=("experts",), num_inputs=1),
    "fit-router": Operation(_fit_router, ("on", "router", "describe", "keep"), needs=("on",), distinct=True),
    "add-expert": Operation(_add_expert, ()),
    "drop-expert": Operation(_drop_expert, ("expert",), needs=("expert",), num_inputs=1),
    "pick-ranks": Operation(_pick_ranks, ("energy", "rank"), needs=("energy",), num_inputs=1),
    "upcycle": Operation(_upcycle, ("experts",), needs=("experts",), num_inputs=1),
    "imagine": Operation(_imagine, ("on",), needs=("on",), distinct=True),
    "extract": Operation(_extract, ("rank",), ("rank",), 2, "the tuned model and its base"),
}


_KINDS = {"on": "a recipe or a run", "expert": "numbers of experts, such as 1,3", "energy": "a share from 0 to 1"}


def _check(name: str, inputs: Sequence[str], options: ComposeOptions) -> None:
    if name not in OPERATIONS:
        raise InputRefused(f"compose: unknown '{name}'; {nearest(name, OPERATIONS)}")
    operation = OPERATIONS[name]
    # An option that an operation would pass over is refused: a weight that is not used should not look used.
    for key, value in asdict(options).items():
        if value is not None and key not in operation.takes:
            raise InputRefused(f"--{key}: {name} takes none; it takes {' and '.join(operation.takes)}")
        if value is None and key in operation.needs:
            raise InputRefused(f"--{key}: {name} needs it, {_KINDS.get(key, 'a whole number')}")
    if options.steps is not None and options.learn is None:
        raise InputRefused("--steps: nothing learns; name a recipe with --learn")
    if operation.num_inputs is not None and len(inputs) != operation.num_inputs:
        raise InputRefused(f"compose {name} takes {operation.inputs}, {len(inputs)} given")
    places = [Path(each).resolve() for each in inputs]
    twice = next((each for each, place in zip(inputs, places, strict=True) if places.count(place) > 1), None)
    if operation.distinct and twice is not None:
        raise InputRefused(f"compose {name}: '{twice}' is given twice; give each once")


def write_mixture(
    config: MixtureConfig, tensors: Mapping[str, Tensor], base: str, folder: Path, settings: Settings | None
) -> None:
    """Write an adapter of this package, which loads with `import qd2mora; PeftModel.from_pretrained`.

    `settings`: the base with its quantisation, where it is known.
    """
    config.base_model_name_or_path, config.inference_mode = base, True
    save_pretrained(config, folder)
    bad = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        raise NotFinite(f"compose: '{bad[0]}' of the result is not finite: the numbers of the inputs are too large")
    entries = [tensor_at_hand(MODEL_PREFIX + name, tensor.contiguous()) for name, tensor in tensors.items()]
    _seal(folder, {WEIGHTS: write_tensors(folder / WEIGHTS, entries)}, settings)


def _seal(folder: Path, files: Mapping[str, SizeAndHash], settings: Settings | None) -> None:
    """Write the manifest; with the base that was trained on, `generate` loads it quantised as it was."""
    about: dict[str, object] = {"kind": "composed"}
    if settings:
        about["base"] = settings
    seal_whole_folder(folder, files, about)


__all__ = ["OPERATIONS", "ComposeOptions", "Composed", "compose"]
