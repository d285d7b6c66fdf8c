"""The whole way from tokens to loss, beside TRL's trainers on the same batch and the same adapter."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor

from qd2mora.base import load_base, load_tokenizer
from qd2mora.data import Pair, Row, collate
from qd2mora.memory.loss import RowLoss
from qd2mora.mixture import MixtureConfig
from qd2mora.objectives import Objective, Said
from qd2mora.objectives.dpo import Dpo
from qd2mora.objectives.kto import Kto
from qd2mora.objectives.reference import Reference
from qd2mora.recipe import Base

ARGUMENTS: dict[str, Any] = {"use_cpu": True, "report_to": "none", "bf16": False, "per_device_train_batch_size": 4}
MASKS = ("input_ids", "attention_mask", "completion_mask")
ROWS = [
    {"prompt": f"Say {one}: ", "chosen": f"{one} sun", "rejected": f"{two} moon star"}
    for one, two in zip(tiny.WORDS, tiny.WORDS[::-1], strict=True)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_base(tmp_path_factory.mktemp("trl") / "base"))


def adapted(folder: str) -> PeftModel:
    """Return a base with an adapter that says something."""
    config = MixtureConfig(method="d2mora", rank=4, alpha=8, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(load_base(Base(model=folder, quantization="none")), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "mixture_B" in name:
                tensor.normal_(std=0.1)
    return model


def row_of(ids: Tensor, attended: Tensor, answer: Tensor, worth: float | None = None) -> Row:
    """Return a line of TRL's batch, which pads on either side, as a row of ours."""
    kept = attended.bool()
    masked = int((answer[kept] == 0).sum())
    return Row(0, ids[kept].numpy().astype("int32"), masked, Pair("", "", worth=worth))


def our_loss(model: PeftModel, lines: list[Row], objective: Objective, baseline: float = 0.0) -> float:
    """Return the mean loss of lines as a run computes it, in chunks of 5 tokens."""
    loss, reference = RowLoss(model.eval(), 5), Reference(model, has_start=False)

    def run() -> Tensor:
        with torch.no_grad():
            return loss(collate(lines, 3))

    said = Said(run(), lines, reference.losses(lines, run), baseline)
    return float(objective.losses(said).mean())


@pytest.mark.parametrize(("ours", "theirs"), [("sigmoid", "sigmoid"), ("hinge", "hinge"), ("ipo", "ipo")])
def test_dpo_is_trls_trainer_on_the_same_batch(ours: str, theirs: str, folder: str, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    model = adapted(folder)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(str(tmp_path), beta=0.3, loss_type=theirs, **ARGUMENTS),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=load_tokenizer(folder),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    model.eval()
    with torch.no_grad():
        wanted = float(trainer._compute_loss(model, batch, return_outputs=False))
    lines = [row_of(*each) for each in zip(*(batch[name] for name in MASKS), strict=True)]
    half = len(lines) // 2
    interleaved = [line for pair in zip(lines[:half], lines[half:], strict=True) for line in pair]
    assert our_loss(model, interleaved, Dpo(0.3, ours)) == pytest.approx(wanted, abs=1e-5)


def test_kto_is_trls_trainer_on_the_same_batch(folder: str, tmp_path: Path) -> None:
    from trl import KTOConfig, KTOTrainer

    model = adapted(folder)
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen" if place % 2 else "rejected"], "label": bool(place % 2)}
        for place, row in enumerate(ROWS)
    ]
    trainer = KTOTrainer(
        model,
        args=KTOConfig(str(tmp_path), beta=0.3, **ARGUMENTS),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(folder),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    model.eval()
    with torch.no_grad():
        wanted = float(trainer._compute_loss(model, batch, return_outputs=False))

    def lines_of(prefix: str) -> list[Row]:
        names = [f"{prefix}{name}" for name in MASKS]
        labels = [float(label) for label in batch["label"]]
        return [row_of(*each) for each in zip(*(batch[name] for name in names), labels, strict=True)]

    loss, reference, others = RowLoss(model, 5), Reference(model, has_start=False), lines_of("KL_")

    def run() -> Tensor:
        with torch.no_grad():
            return loss(collate(others, 3))

    baseline = max(0.0, float(Said(run(), others, reference.losses(others, run)).log_ratios.mean()))
    assert our_loss(model, lines_of(""), Kto(0.3), baseline) == pytest.approx(wanted, abs=1e-5)
