"""The embedding in host memory: rows are looked up there, and only they go to the device."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qd2mora.memory.pinned import pinned


def keep_embedding_on_host(model: PreTrainedModel, device: torch.device) -> None:
    """Keep the input embedding in host memory; its output comes on `device`.

    The head must not be tied to it: the planner never asks for that. Its weight is no parameter of the model's any
    more: transformers takes the place of the first one, which it is, for the place of the model, and would have
    `generate` move every prompt to the host.
    """
    embedding = model.get_input_embeddings()
    assert embedding.weight is not model.get_output_embeddings().weight
    weight = embedding.weight.detach().cpu()
    del embedding.weight
    embedding.weight = weight

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Ids are a few kilobytes; a LLaMA-3's embedding is 1 GiB in 16 bits.
        return tuple(ids.cpu() for ids in inputs)

    def after(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        if device.type != "cuda":
            return output.to(device)
        # Pinned, the copy runs beside the host; the allocator keeps the pages until the copy is made.
        return pinned(output).to(device, non_blocking=True)

    embedding.register_forward_pre_hook(before)
    embedding.register_forward_hook(after)


__all__ = ["keep_embedding_on_host"]
