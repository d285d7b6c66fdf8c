"""The adapter in other people's training loops: transformers' Trainer and TRL's SFTTrainer."""

from pathlib import Path

import tiny
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
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


def test_it_trains_in_a_stock_trainer_and_its_checkpoint_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(load_base(Base(model="random:tiny")), MixtureConfig(**CONFIG))
    ids = torch.randint(3, 19, (8, 16)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 16] * 8, "labels": ids})
    trainer = Trainer(model, TrainingArguments(str(tmp_path), **ARGUMENTS), train_dataset=data)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.3
    saved = PeftModel.from_pretrained(load_base(Base(model="random:tiny")), tmp_path / "checkpoint-12").eval()
    batch = torch.tensor(ids)
    with torch.no_grad():
        assert torch.equal(saved(batch).logits, model.eval()(batch).logits)


def test_it_trains_in_the_sft_trainer(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    folder = str(tiny.save_base(tmp_path / "base"))
    rows = [{"prompt": row["input"] + " -> ", "completion": row["output"]} for row in tiny.rows_of("first", 24)]
    trainer = SFTTrainer(
        load_base(Base(model=folder)),
        args=SFTConfig(str(tmp_path / "out"), max_length=64, **ARGUMENTS),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(folder),
        peft_config=MixtureConfig(**CONFIG),
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.3
    trained = [name for name, tensor in trainer.model.named_parameters() if tensor.requires_grad]
    assert trained and all(".mixture_" in name for name in trained)
