"""Recomputing decoder layers in the backward pass instead of keeping their activations."""

from transformers import PreTrainedModel


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # transformers has embeddings ask for a gradient, which reentrant recomputing alone needs: it would stay, and be
    # computed, in vain.
    model.disable_input_require_grads()


__all__ = ["enable_checkpointing"]
