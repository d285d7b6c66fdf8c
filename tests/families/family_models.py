"""A tiny random model of each family that is supported, with what makes the family what it is turned on."""

from pathlib import Path

import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
WINDOW = 16
"""Of attention where a family has one: far below a row's length."""

FAMILIES: dict[str, PreTrainedConfig] = {
    "llama2": LlamaConfig(**SIZES | {"num_key_value_heads": 4}, tie_word_embeddings=False),
    "llama3.2": LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
    "mistral": MistralConfig(**SIZES, sliding_window=WINDOW, head_dim=32),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "gemma2": Gemma2Config(
        **SIZES, head_dim=32, query_pre_attn_scalar=32, sliding_window=WINDOW, attn_logit_softcapping=2.0
    ),
    "gemma3": Gemma3TextConfig(
        **SIZES | {"num_hidden_layers": 6}, head_dim=32, query_pre_attn_scalar=32, sliding_window=WINDOW
    ),
    "phi3": Phi3Config(**SIZES, sliding_window=WINDOW),
    "smollm3": SmolLM3Config(**SIZES),
    "olmo2": Olmo2Config(**SIZES),
    "granite": GraniteConfig(
        **SIZES,
        attention_multiplier=0.25,
        embedding_multiplier=6.0,
        residual_multiplier=0.5,
        logits_scaling=4.0,
        tie_word_embeddings=True,
    ),
}


def save_family(name: str, folder: Path, seed: int = 0) -> Path:
    """Save a random model of a family with a tokenizer; return the folder."""
    tiny.save_tokenizer(folder)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[name])
    with torch.no_grad():
        for parameter in model.parameters():
            # Random norms and biases: at their first values a family's own formula would not be seen.
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    return folder
