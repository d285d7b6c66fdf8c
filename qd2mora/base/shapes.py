"""Sizes of known LLaMAs, so that a base can be planned, or made of random numbers, without its files."""

from dataclasses import dataclass

from transformers import LlamaConfig

from qd2mora.base.files import RANDOM
from qd2mora.errors import InputRefused, nearest


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA: what a random base is built from."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int = 32_000
    max_length: int = 4096
    tied: bool = False

    def config(self) -> LlamaConfig:
        """Return transformers' configuration of this shape."""
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.max_length,
            tie_word_embeddings=self.tied,
            pad_token_id=0,
        )


SHAPES = {
    "tiny": Shape(64, 192, 2, 4, 2, vocab=512, max_length=512),
    # As their config.json say; of 7B, LLaMA 1 and 2 differ in the context alone.
    "llama-7b": Shape(4096, 11008, 32, 32, 32, max_length=2048),
    "llama2-7b": Shape(4096, 11008, 32, 32, 32),
    "llama2-13b": Shape(5120, 13824, 40, 40, 40),
    "llama2-70b": Shape(8192, 28672, 80, 64, 8),
    "llama3-8b": Shape(4096, 14336, 32, 32, 8, vocab=128_256, max_length=8192),
}


def shape_of(model: str) -> Shape:
    """Return the shape that `random:NAME` names. Raises InputRefused."""
    name = model.removeprefix(RANDOM)
    if name not in SHAPES:
        raise InputRefused(f"base.model: no shape '{name}'; {nearest(name, SHAPES)}")
    return SHAPES[name]


__all__ = ["SHAPES", "Shape", "shape_of"]
