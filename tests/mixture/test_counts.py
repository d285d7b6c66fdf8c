"""Parameter counts on true LLaMA-7B shapes, built on the meta device: the paper's Table 1."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from qd2mora.base import SHAPES
from qd2mora.mixture import MixtureConfig
from qd2mora.mixture.counts import llama_linears, trainable_parameters
from qd2mora.mixture.presets import METHODS

COUNTS = [
    ("d2mora", 8, 3, 8, 35_788_800),
    ("d2mora", 16, 3, 4, 45_225_984),
    ("d2mora", 16, 4, 3, 45_617_664),
    ("lora", 64, 1, 1, 50_331_648),
    ("moslora", 64, 1, 1, 50_724_864),
    ("moelora", 8, 8, 8, 50_383_872),
    ("moelora", 16, 4, 4, 50_371_584),
    ("hydralora", 12, 1, 8, 45_613_056),
    ("hydralora", 16, 1, 6, 46_399_488),
]


@pytest.mark.parametrize(("method", "rank", "down", "up", "count"), COUNTS)
def test_a_7b_has_as_many_trainable_parameters_as_the_paper_says(
    method: str, rank: int, down: int, up: int, count: int
) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES["llama-7b"].config())
    config = MixtureConfig(
        method=method,
        rank=rank,
        down={"experts": down},
        up={"experts": up},
        num_tasks=8 if method == "moelora" else None,
        target_modules=["q_proj", "k_proj", "v_proj"],
    )
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    assert sum(tensor.numel() for tensor in adapted.parameters() if tensor.requires_grad) == count


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.backend == "ours"])
def test_counting_from_sizes_alone_equals_counting_the_tensors(method: str) -> None:
    row, shape = METHODS[method], SHAPES["llama-7b"]
    config = MixtureConfig(
        method=method,
        num_tasks=8 if row.reads_task else None,
        external_width=64 if row.reads_vector else None,
        target_modules=list(row.targets),
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config())
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    counted = sum(tensor.numel() for tensor in adapted.parameters() if tensor.requires_grad)
    linears = llama_linears(shape.hidden, shape.intermediate, shape.hidden, shape.hidden)
    assert trainable_parameters(config, linears, shape.layers, shape.hidden) == counted
