"""A base prepared as planned: what is kept, what leaves the device, what is recomputed."""

import torch
from transformers import PreTrainedModel

from qd2mora.memory.boundaries import decoder_layers, recompute_layers
from qd2mora.memory.embedding import keep_embedding_on_host
from qd2mora.memory.lean import make_lean
from qd2mora.memory.ledger import Setting
from qd2mora.memory.streaming import LayerStream, move_unstreamed


def prepare_base(base: PreTrainedModel, setting: Setting, device: torch.device) -> LayerStream | None:
    """Apply a plan to a base before it is given adapters; return the stream where layers are streamed.

    A base to be streamed comes in host memory, any other on the device.
    """
    make_lean(base)
    stream = None
    if setting.stream:
        stream = LayerStream(list(decoder_layers(base)), device)
        move_unstreamed(base, device, but=base.get_input_embeddings() if setting.offload_embeddings else None)
    if setting.offload_embeddings:
        keep_embedding_on_host(base, device)
    recompute_layers(base, setting.recomputed, setting.offload_activations, device)
    return stream


__all__ = ["prepare_base"]
