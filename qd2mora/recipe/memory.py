"""The recipe's memory section: what may be traded for memory. None of it changes the result."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qd2mora.recipe.section import Count, Section

SIZE_UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "GB": 10**9, "MB": 10**6}
SIZE = rf"^\d{{1,12}}(\.\d{{1,12}})? ?({'|'.join(SIZE_UNITS)})$"
"""How an amount of memory is written."""


class Offload(Section):
    """What may leave the device for host memory; `auto`: only where the plan fits the budget no faster."""

    activations: Literal["auto", "none", "cpu"] = "auto"
    """Inputs of recomputed layers: copied out in the forward pass and back in time, beside the computing."""
    embeddings: Literal["auto", "none", "cpu"] = "auto"
    """Token rows are looked up on the host; not where the output head is tied to them."""
    optimizer: Literal["none", "cpu"] = "none"
    """`cpu`: moments and update on the host, with `engine: deepspeed`; `train.optimizer: paged_adamw_8bit` without."""
    weights: Literal["auto", "none", "stream"] = "auto"
    """`stream`: frozen linears live in pinned host memory, and two decoder layers at a time on the device; with
    `zero_stage: 3` DeepSpeed's own offload of parameters."""


class Memory(Section):
    """What may be traded for memory."""

    budget: Annotated[str, Field(pattern=SIZE)] | None = None
    """The plan must fit this, for example 8GiB, and leave 4% of it, at least 256 MiB; left out: what is free."""
    checkpointing: Literal["auto", "on", "off"] | Count = "auto"
    """Recompute decoder layers in the backward pass: all, none, or the first N; auto: as few as the budget needs."""
    accumulation: Literal["auto", "micro_batch", "layer"] = "auto"
    """How the micro batches of a step follow each other: `micro_batch`, one through the whole model after the other;
    `layer`, all through each layer in turn, so that a streamed layer is fetched once for all of them, with every layer
    recomputed; `auto`: as is faster."""
    loss_chunk: Literal["auto"] | Count = "auto"
    """Labelled tokens whose logits are held at once."""
    offload: Offload = Offload()
    rehearsal: Literal["auto", "on", "off"] = "auto"
    """Run the longest training batch, the longest evaluation batch and a checkpoint's room on disk through before the
    first step; auto: where the planned peak is more than half of the memory there is."""
    engine: Literal["none", "deepspeed"] = "none"
    """`deepspeed`: moments are shared out over the processes of a run (ZeRO)."""
    zero_stage: Literal[2, 3] = 2
    """What is shared out: 2, the moments; 3, frozen weights too, which visit linear by linear. A pass that runs out
    of memory then ends the run, to be resumed with a smaller `train.micro_batch`."""

    @model_validator(mode="after")
    def _engine_moves_moments(self) -> "Memory":
        if self.offload.optimizer == "cpu" and self.engine == "none":
            raise ValueError("offload.optimizer: cpu needs engine: deepspeed, which keeps moments on the host")
        if self.zero_stage == 3 and self.engine == "none":
            raise ValueError("zero_stage: 3 needs engine: deepspeed")
        return self


__all__ = ["SIZE", "SIZE_UNITS", "Memory", "Offload"]
