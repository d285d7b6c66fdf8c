"""The adapter in other people's training loops: transformers' Trainer and TRL's SFTTrainer."""

from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from qd2mora.base import load_base, load_tokenizer
from qd2mora.mixture import MixtureConfig
from qd2mora.recipe import Base

CONFIG = {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
ARGUMENTS = {
    "max_steps": 12,
    "per_device_train_batch_size": 8,
    "learning_rate": 2e-2,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "save_steps": 12,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def losses(trainer: Trainer) -> list[float]:
    return [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]


def stock_trainer(folder: Path, **changes: object) -> Trainer:
    """A trainer over eight rows drawn from sixteen ids, two micro-batches of four an epoch."""
    torch.manual_seed(0)
    model = get_peft_model(load_base(Base(model="random:tiny")), MixtureConfig(**CONFIG))
    ids = torch.randint(3, 19, (8, 16)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 16] * 8, "labels": ids})
    return Trainer(model, TrainingArguments(str(folder), **(ARGUMENTS | changes)), train_dataset=data)


def adapter_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters() if "mixture_" in name}


def test_it_trains_in_a_stock_trainer_and_its_checkpoint_loads(tmp_path: Path) -> None:
    trainer = stock_trainer(tmp_path)
    base = {name: tensor.clone() for name, tensor in trainer.model.named_parameters() if "mixture_" not in name}
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.3
    assert all(torch.equal(tensor, base[n]) for n, tensor in trainer.model.named_parameters() if n in base)
    saved = PeftModel.from_pretrained(load_base(Base(model="random:tiny")), tmp_path / "checkpoint-12").eval()
    batch = torch.tensor(trainer.train_dataset["input_ids"])
    with torch.no_grad():
        assert torch.equal(saved(batch).logits, trainer.model.eval()(batch).logits)


def test_a_resumed_stock_trainer_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    changes = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    unbroken = stock_trainer(tmp_path / "unbroken", **changes)
    unbroken.train()
    resumed = stock_trainer(tmp_path / "resumed", **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-3"))
    ours, wanted = adapter_of(resumed.model), adapter_of(unbroken.model)
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in wanted.items())
    halfway = PeftModel.from_pretrained(load_base(Base(model="random:tiny")), tmp_path / "unbroken" / "checkpoint-3")
    assert not all(torch.equal(tensor, wanted[name]) for name, tensor in adapter_of(halfway).items())


@pytest.mark.parametrize("wrapped", [False, True], ids=["peft_config", "wrapped model"])
def test_it_trains_in_the_sft_trainer(wrapped: bool, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    folder = str(tiny.save_base(tmp_path / "base"))
    rows = [{"prompt": row["input"] + " -> ", "completion": row["output"]} for row in tiny.rows_of("first", 24)]
    base = load_base(Base(model=folder))
    trainer = SFTTrainer(
        get_peft_model(base, MixtureConfig(**CONFIG)) if wrapped else base,
        args=SFTConfig(str(tmp_path / "out"), max_length=64, **ARGUMENTS),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(folder),
        peft_config=None if wrapped else MixtureConfig(**CONFIG),
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.3
    trained = [name for name, tensor in trainer.model.named_parameters() if tensor.requires_grad]
    assert trained and all(".mixture_" in name for name in trained)
    saved = PeftModel.from_pretrained(load_base(Base(model=folder)), tmp_path / "out" / "checkpoint-12")
    ours = adapter_of(trainer.model)
    assert ours and all(torch.equal(tensor, ours[name]) for name, tensor in adapter_of(saved).items())
