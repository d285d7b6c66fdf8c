"""The table of known models: each has the parameters that were published, and hub ids find it, whoever publishes."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from qd2mora.base.families import family_of
from qd2mora.base.known_models import known_config, known_models, known_name


@pytest.mark.parametrize("name", known_models())
def test_a_shape_has_the_published_number_of_parameters(name: str) -> None:
    config = known_config(name)
    family_of(config, name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(tensor.numel() for tensor in model.parameters()) == known_models()[name]["parameters"]


# What their publishers, or the files themselves, say: not computed here.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "phi-3-mini-4k": 3_821_079_552,
    "smollm2-135m": 134_515_008,
    "smollm3-3b": 3_075_098_624,
}


def test_the_table_says_what_was_published() -> None:
    assert len(known_models()) >= 30
    assert {name: known_models()[name]["parameters"] for name in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("unsloth/Meta-Llama-3.1-8B-bnb-4bit", "llama-3.1-8b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
        ("Qwen/Qwen3-8B-Base", "qwen3-8b"),
        ("google/gemma-2-9b-it", "gemma-2-9b"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
        ("somebody/else", None),
        ("./llama-2-7b", None),
        ("a/b/llama-2-7b", None),
    ],
)
def test_hub_ids_find_their_shape(model: str, name: str | None) -> None:
    assert known_name(model) == name
