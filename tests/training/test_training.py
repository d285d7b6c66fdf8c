"""Training: what a run leaves behind, what does not change it, and what it survives."""

import json
import shutil
from pathlib import Path

import pytest
import reference
import tiny
import torch
from interrupted import stop_after
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from qd2mora.base import load_base, load_tokenizer
from qd2mora.data import TaskMix, collate, prepare
from qd2mora.errors import DamagedFile, InputRefused, NotFinite, SignalStop
from qd2mora.memory.loss import RowLoss
from qd2mora.mixture import MixtureConfig, add_adapter
from qd2mora.recipe import Train, load_recipe
from qd2mora.training import train
from qd2mora.training.updates import learning_rate


def recipe(made: Path, output: Path, *overrides: str, method: str = "d2mora"):
    path = output.parent / f"{output.name}.yaml"
    path.write_text(tiny.recipe_text(made / "base", made / "data", output, method=method), encoding="utf-8")
    return load_recipe(path, overrides)


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def losses_of(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def assert_same_bytes(one: Path, two: Path) -> None:
    first, second = adapter_of(one), adapter_of(two)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_a_run_leaves_the_promised_folder(made: Path, tmp_path: Path) -> None:
    settings = recipe(made, tmp_path / "run")
    trained = train(settings)
    run = trained.folder
    names = {path.name for path in run.iterdir()}
    assert names == {
        "adapter",
        "best",
        "checkpoints",
        "manifest.json",
        "metrics.jsonl",
        "recipe.yaml",
        "routing.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-4", "step-6"}
    assert load_recipe(run / "recipe.yaml") == settings
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [sorted(line["eval_loss"]) for line in lines if "eval_loss" in line] == [["first", "last"]] * 3
    assert {"penalty_down", "penalty_up", "learning_rate"} <= lines[1].keys()
    assert {path.suffix for path in run.rglob("*") if path.is_file()} <= {
        ".json",
        ".jsonl",
        ".yaml",
        ".safetensors",
        ".md",
    }
    assert json.loads((run / "manifest.json").read_text(encoding="utf-8"))["plan"]["fits"]


def test_the_saved_adapter_loads_with_peft_and_has_learned(made: Path, tmp_path: Path) -> None:
    settings = recipe(made, tmp_path / "run", "train.steps=15", "train.eval_every=15", "train.learning_rate=3e-2")
    train(settings)
    losses = losses_of(tmp_path / "run")
    assert losses[-1] < 0.95 * losses[0]
    model = PeftModel.from_pretrained(load_base(settings.base), str(tmp_path / "run" / "adapter"))
    assert any(bool(tensor.any()) for name, tensor in model.named_parameters() if "mixture_B" in name)


def test_the_loss_of_a_step_is_the_mean_over_its_labelled_tokens(made: Path, tmp_path: Path) -> None:
    settings = recipe(made, tmp_path / "run", "train.steps=1")
    train(settings)
    tokenizer = load_tokenizer(settings.base.model)
    rows = TaskMix(settings.data, prepare(settings.data, tokenizer, 0), 0).rows(0, 4)
    batch = collate(rows, tokenizer.pad_token_id)
    with torch.no_grad():
        logits = load_base(settings.base)(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    wanted = reference.nll(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert losses_of(tmp_path / "run")[0] == pytest.approx(wanted, rel=1e-4)


class _Logits(TorchDispatchMode):
    """Counts the tokens whose logits are computed, by the width of the products."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.tokens = width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and out.shape[-1] == self.width:
            self.tokens += out.shape[0]
        return out


def test_the_loss_of_rows_equals_the_library_and_computes_logits_of_labelled_tokens_only(
    made: Path, tmp_path: Path
) -> None:
    settings = recipe(made, tmp_path / "run")
    tokenizer = load_tokenizer(settings.base.model)
    rows = prepare(settings.data, tokenizer, 0)[0].train[:5]
    batch = collate(rows, tokenizer.pad_token_id)
    base = load_base(settings.base)
    model = add_adapter(base, MixtureConfig.from_recipe(settings.adapter, 2), 0)
    width = base.lm_head.out_features
    with _Logits(width) as every:
        wanted = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    assert every.tokens == batch["labels"].numel()
    num_labels = sum(row.num_labels for row in rows)
    with _Logits(width) as labelled:
        whole = RowLoss(model)(batch).sum()
    assert labelled.tokens == num_labels < every.tokens
    torch.testing.assert_close(whole / num_labels, wanted)
    chunked = RowLoss(model, chunk=3)(batch).sum()
    torch.testing.assert_close(chunked, whole)
    parameters = [tensor for tensor in model.parameters() if tensor.requires_grad]
    pairs = zip(*(torch.autograd.grad(loss, parameters) for loss in (whole, chunked)), strict=True)
    for one, two in pairs:
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_neither_micro_batch_nor_recomputing_nor_saving_changes_the_adapter(made: Path, tmp_path: Path) -> None:
    penalty = "adapter.penalty=0.01"
    train(recipe(made, tmp_path / "a", penalty))
    train(recipe(made, tmp_path / "b", penalty, "train.micro_batch=4"))
    first, second = adapter_of(tmp_path / "a"), adapter_of(tmp_path / "b")
    for name, tensor in first.items():
        assert (tensor - second[name]).norm() <= 1e-3 * tensor.norm().clamp_min(1e-3), name
    train(recipe(made, tmp_path / "c", penalty, "memory.checkpointing=on", "train.save_every=5", "train.eval_every=6"))
    assert_same_bytes(tmp_path / "a", tmp_path / "c")


# A plain AdamW's resume is what the gates of `tests/reliability` go on about.
@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.long), "adamw_8bit"])
def test_a_run_stopped_by_a_signal_resumes_to_the_same_bytes(
    optimizer: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = (f"train.optimizer={optimizer}", "adapter.dropout=0.2")
    train(recipe(made, tmp_path / "whole", *changes))
    stop_after(3, monkeypatch)
    settings = recipe(made, tmp_path / "broken", *changes)
    with pytest.raises(SignalStop):
        train(settings)
    monkeypatch.undo()
    assert not (tmp_path / "broken" / "adapter").exists()
    train(settings, resume=True)
    assert_same_bytes(tmp_path / "whole", tmp_path / "broken")
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "broken")


def test_a_damaged_checkpoint_is_passed_over_and_only_damage_everywhere_stops(made: Path, tmp_path: Path) -> None:
    settings = recipe(made, tmp_path / "run")
    train(settings)
    wanted = adapter_of(tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / ".step-8.partial").mkdir()
    for name in ("adapter.safetensors", "optimizer.safetensors"):
        path = checkpoints / "step-6" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        shutil.rmtree(tmp_path / "run" / "adapter")
        train(settings, resume=True)
        for key, tensor in adapter_of(tmp_path / "run").items():
            assert torch.equal(tensor, wanted[key])
    for folder in checkpoints.glob("step-*"):
        (folder / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(DamagedFile):
        train(settings, resume=True)


def test_a_changed_recipe_is_not_resumed(made: Path, tmp_path: Path) -> None:
    train(recipe(made, tmp_path / "run"))
    with pytest.raises(InputRefused, match=r"train\.learning_rate"):
        train(recipe(made, tmp_path / "run", "train.learning_rate=1e-4"), resume=True)
    assert train(recipe(made, tmp_path / "run", "train.save_every=3"), resume=True).steps == 6


def test_steps_that_are_not_finite_stop_the_run_and_keep_what_was_saved(made: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFinite, match="bad steps in a row"):
        train(recipe(made, tmp_path / "run", "train.learning_rate=1e30", "train.schedule=constant", "train.steps=9"))
    assert not (tmp_path / "run" / "adapter").exists()
    for path in (tmp_path / "run" / "checkpoints").glob("*/adapter.safetensors"):
        assert load_file(path)


# The other rows' are in `test_every_method`.
@pytest.mark.parametrize("method", ["lora", "moslora"])
def test_a_method_without_routers_trains(method: str, made: Path, tmp_path: Path) -> None:
    trained = train(recipe(made, tmp_path / "run", "train.steps=3", method=method))
    assert set(trained.eval_loss) == {"first", "last"}


def test_epochs_are_steps_over_all_rows(made: Path, tmp_path: Path) -> None:
    settings = recipe(made, tmp_path / "run", "train.steps=null", "train.epochs=0.5")
    assert train(settings).steps == 8  # half of 64 rows, 4 a step


def test_trackers_write_into_the_run_folder(made: Path, tmp_path: Path) -> None:
    train(recipe(made, tmp_path / "run", "train.steps=1", "train.trackers=[tensorboard]"))
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_the_learning_rate_warms_up_and_ends_at_zero() -> None:
    settings = Train(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(settings, update, 100) for update in range(101)]
    assert rates[9] == rates[10] == 1.0 == max(rates)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == 0.0
    cosine = settings.model_copy(update={"schedule": "cosine"})
    assert learning_rate(cosine, 55, 100) == pytest.approx(0.5)
