"""Every method from recipe to answers: it trains, its adapter loads again, its export is what its class says."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from qd2mora.errors import InputRefused
from qd2mora.evaluation import TalkOptions, generate
from qd2mora.merging import ExportOptions, merge
from qd2mora.mixture.presets import METHODS
from qd2mora.recipe import Recipe, load_recipe
from qd2mora.run_folder import open_run
from qd2mora.training import train

GIVEN = [name for name, row in METHODS.items() if row.given == "needed"]
FRESH = [name for name in METHODS if name not in GIVEN]
# Smaller than the rows' defaults, so that a tiny model can take them.
SETTINGS: dict[str, list[str]] = {
    "mola": ["adapter.allocation=2-4"],
    "noisy_top_k": ["adapter.targets=[mlp]"],
    "reclora": ["adapter.external_width=3"],
    "flexmore": ["adapter.rank=null", "adapter.ranks=[0,1,2,3]", "adapter.targets=null"],
    "smora": ["adapter.gates={rank: {top_k: 2}}"],
    "mora": ["adapter.gates={rank: {top_k: 2}}"],
    "flylora": ["adapter.gates={rank: {top_k: 2}}"],
    "clora": tiny.SPANNED,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    tiny.save_base(folder / "base")
    tiny.save_tasks(folder / "data", number=16, with_more=True)
    return folder


def recipe(made: Path, run: Path, method: str, *overrides: str) -> Recipe:
    path = made / f"{run.name}.yaml"
    path.write_text(tiny.recipe_text(made / "base", made / "data", run, method=method), encoding="utf-8")
    more = ["data.tasks.0.group=0", "data.tasks.1.group=1"]
    more += ["data.tasks.0.vector=who", "data.tasks.1.vector=who"] if method == "reclora" else []
    few = ["data.tasks.0.validation=2", "data.tasks.1.validation=2", "train.save_every=9"]
    return load_recipe(
        path, ["train.steps=3", "train.eval_every=3", *few, *SETTINGS.get(method, []), *more, *overrides]
    )


@pytest.fixture(scope="module")
def loras(made: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("loras")
    names = ["first", "second"]
    for number, name in enumerate(names):
        train(recipe(made, folder / name, "lora", f"adapter.rank={number + 2}", f"train.seed={number}"))
    return [str(folder / name) for name in names]


# Every fourth row by default, all in the long set; `tests/mixture/test_methods.py` runs over all rows' numbers.
@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=pytest.mark.long if place % 4 else []) for place, name in enumerate(FRESH)],
)
def test_a_method_trains_loads_again_answers_and_exports_as_its_class_says(
    method: str, made: Path, tmp_path: Path
) -> None:
    trained = train(recipe(made, tmp_path / "run", method))
    assert set(trained.eval_loss) == {"first", "last"} and trained.bad_steps == 0
    check_run(tmp_path, method)


@pytest.mark.parametrize("method", GIVEN)
def test_a_method_over_trained_loras_trains_loads_again_answers_and_exports(
    method: str, made: Path, loras: list[str], tmp_path: Path
) -> None:
    settings = recipe(made, tmp_path / "run", method, "adapter.rank=null", "adapter.targets=null")
    adapter = settings.adapter.model_copy(update={"adapters": loras})
    trained = train(settings.model_copy(update={"adapter": adapter}))
    assert trained.bad_steps == 0
    check_run(tmp_path, method)


def check_run(folder: Path, method: str) -> None:
    row = METHODS[method]
    tensors = load_file(folder / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert any(tensor.any() for name, tensor in tensors.items() if name.endswith(("mixture_B", "lora_B.weight")))
    open_run(folder / "run")
    task, vector = "first" if row.gates.reads_task else None, [0.0, 1.0, 0.0] if row.gates.reads_vector else None
    generate(folder / "run", "Say the first word.", TalkOptions(task, vector, max_new_tokens=2))
    if row.gates.reads_spans:
        with pytest.raises(InputRefused, match="acts in marked spans alone, which an export"):
            merge(folder / "run", folder / "out")
        return
    if row.placement == "block":
        with pytest.raises(InputRefused, match="no weight can take its update"):
            merge(folder / "run", folder / "out")
        return
    # The cheapest closed form where a strategy is needed at all: what they keep is `tests/merging`'s.
    strategy = "core_lsq" if row.gates.depends_on == "token" else "auto"
    merge(folder / "run", folder / "out", ExportOptions(strategy=strategy, task=task, vector=vector))
    report = json.loads((folder / "out" / "export_report.json").read_text(encoding="utf-8"))
    assert report["exact"] == (row.gates.depends_on != "token")
    if report["exact"]:
        # float16 rounding of the whole model, on a loss of about 6
        assert abs(report["loss"]["merged"] - report["loss"]["routed"]) < 1e-3


def test_trained_loras_keep_their_function_inside_a_mixture(made: Path, loras: list[str], tmp_path: Path) -> None:
    settings = recipe(made, tmp_path / "run", "meteora", "adapter.rank=null", "adapter.targets=null")
    adapter = settings.adapter.model_copy(update={"adapters": loras, "train_experts": False})
    train(settings.model_copy(update={"adapter": adapter}))
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for number, folder in enumerate(loras):
        alone = load_file(Path(folder) / "adapter" / "adapter_model.safetensors")
        rank, before = number + 2, 0 if number == 0 else 2
        for name, down in alone.items():
            if name.endswith("mixture_A"):
                banks = (
                    tensors[name][before : before + rank],
                    tensors[name.replace("_A", "_B")][:, before : before + rank],
                )
                up = alone[name.replace("_A", "_B")]
                # alpha 8 over the LoRA's own rank, and over the larger of both in the mixture
                torch.testing.assert_close(banks[1] @ banks[0] * (8 / 3), up[0] @ down[0] * (8 / rank))


def test_a_lora_of_another_base_is_refused(made: Path, loras: list[str], tmp_path: Path) -> None:
    tiny.save_base(tmp_path / "base", hidden=96)
    settings = recipe(made, tmp_path / "run", "cat", "adapter.rank=null", "adapter.targets=null")
    changes = {"adapter": settings.adapter.model_copy(update={"adapters": loras})}
    changes["base"] = settings.base.model_copy(update={"model": str(tmp_path / "base")})
    with pytest.raises(InputRefused, match="another base"):
        train(settings.model_copy(update=changes))


@pytest.mark.parametrize(
    "init",
    [
        "kaiming",
        "pissa",
        "eva",
        *(pytest.param(each, marks=pytest.mark.long) for each in ("orthogonal", "olora", "loftq")),
    ],
)
def test_a_shared_expert_starts_where_it_should_and_trains(init: str, made: Path, tmp_path: Path) -> None:
    settings = recipe(made, tmp_path / "run", "d2mora", f"adapter.shared={{rank: 2, init: {init}}}")
    trained = train(settings)
    assert trained.bad_steps == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    start = next(line["eval_loss"] for line in lines if "eval_loss" in line)
    plain = recipe(made, tmp_path / "plain", "d2mora", "train.steps=1")
    train(plain)
    base = json.loads((tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()[0])["eval_loss"]
    # LoftQ starts nearer the 16-bit base, the others at the 4-bit base itself.
    assert (start == pytest.approx(base, rel=1e-5)) == (init != "loftq")
    check_run(tmp_path, "d2mora")


def test_a_run_that_grows_in_stages_leaves_older_experts_bit_for_bit(made: Path, tmp_path: Path) -> None:
    halves = {}
    for steps in (4, 8):
        # The same schedule of two stages of four steps, stopped after the first or whole.
        settings = recipe(
            made, tmp_path / f"run{steps}", "scalezero", "adapter.down={experts: 2}", "adapter.up={experts: 2}"
        )
        update = {"steps": 8, "schedule": "constant", "save_every": 4, "keep_checkpoints": 2}
        settings = settings.model_copy(update={"train": settings.train.model_copy(update=update)})
        if steps == 8:
            train(settings)
            halves = {
                step: load_file(tmp_path / "run8" / "checkpoints" / f"step-{step}" / "adapter.safetensors")
                for step in (4, 8)
            }
    for name, early in halves[4].items():
        late = halves[8][name]
        if name.rpartition(".")[0].endswith(("mixture_A", "mixture_B")):
            assert torch.equal(early[0], late[0]) and not torch.equal(early[1], late[1]), name


@pytest.mark.parametrize(
    "method",
    [
        "flylora",
        "noisy_top_k",
        *(pytest.param(each, marks=pytest.mark.long) for each in ("remix", "scalezero", "d2mora")),
    ],
)
def test_a_resumed_run_ends_with_the_same_bytes_where_there_is_chance_or_a_moving_bias(
    method: str, made: Path, tmp_path: Path
) -> None:
    more = ["train.steps=8", "train.save_every=2", "train.keep_checkpoints=4", "adapter.dropout=0.1"]
    train(recipe(made, tmp_path / "whole", method, *more))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for step in (4, 6, 8):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"step-{step}")
    train(recipe(made, tmp_path / "resumed", method, *more), resume=True)
    ends = [tmp_path / run / "adapter" / "adapter_model.safetensors" for run in ("whole", "resumed")]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    if method == "flylora":
        assert any(tensor.any() for name, tensor in load_file(ends[0]).items() if "select_bias" in name)


def test_the_split_into_micro_batches_changes_nothing_under_dropout_and_routing_penalties(
    made: Path, tmp_path: Path
) -> None:
    ends = []
    for rows in (1, 4):
        more = [f"train.micro_batch={rows}", "adapter.dropout=0.1", "base.quantization=none"]
        train(recipe(made, tmp_path / f"run{rows}", "llava_mole", *more))
        ends.append(load_file(tmp_path / f"run{rows}" / "adapter" / "adapter_model.safetensors"))
    for name, one in ends[0].items():
        # Three updates of AdamW at 5e-3 from gradients that are equal to float32 rounding.
        torch.testing.assert_close(one, ends[1][name], rtol=1e-3, atol=1e-5, msg=name)


def test_dora_experts_train_answer_and_go_on_from_where_they_stopped(made: Path, tmp_path: Path) -> None:
    settings = recipe(made, tmp_path / "run", "mixlora", "adapter.experts=dora", "adapter.targets=null")
    train(settings)
    before = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    moved = [tensor for name, tensor in before.items() if name.endswith("mixture_magnitude")]
    assert len(moved) == 14 and all(torch.isfinite(tensor).all() for tensor in moved)
    generate(tmp_path / "run", "Say the first word.", TalkOptions(max_new_tokens=2))
    for to in ("hf", "exact"):
        with pytest.raises(InputRefused, match="DoRA experts, which scale the base's own output"):
            merge(tmp_path / "run", tmp_path / "out", ExportOptions(to=to))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-3")
    train(settings, resume=True)
    again = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in before.items())
