"""Before each pass through a model: tell the routers which rows run, and run the first pass that some routers read.

A hook on the decoder, because `generate`, other packages' trainers and this one's loss enter at different doors.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qd2mora.mixture.routing import Routing

if TYPE_CHECKING:
    from qd2mora.mixture.tuner import MixtureModel


def watch_passes(model: nn.Module, tuner: "MixtureModel") -> None:
    """Register the hook on a model's decoder, or on the model itself where it has none."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _read_pass(tuner, module, args, kwargs)

    whole: Any = model
    decoder: nn.Module = whole.get_decoder() if hasattr(model, "get_decoder") else model
    decoder.register_forward_pre_hook(before, with_kwargs=True)


def _read_pass(tuner: "MixtureModel", decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Take the padding, whether this continues a cached pass, and the hidden states that a router wants."""
    routing = tuner.routing
    if routing.is_first_pass:
        return
    inputs = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
    cache = kwargs.get("past_key_values", kwargs.get("cache"))
    routing.keeps_pools = cache is not None or kwargs.get("use_cache") is True
    routing.is_decoding = cache is not None and cache.get_seq_length() > 0
    if cache is not None and not routing.is_decoding:
        _follow_beams(routing, cache)
    mask = kwargs.get("attention_mask")
    length = inputs.shape[1] if isinstance(inputs, Tensor) and inputs.dim() > 1 else 0
    routing.attended = mask[:, -length:].bool() if isinstance(mask, Tensor) and mask.dim() == 2 and length else None
    is_packed = mask is None and routing.segments is not None and routing.segments.shape[1] == length
    if is_packed and routing.segments is not None:
        routing.attended = routing.segments >= 0
    # `generate` brings a cache and its whole input is the prompt, whatever an earlier pass said.
    if routing.prompt is not None and (cache is not None or routing.prompt.shape[1] != length):
        routing.prompt = None
    if wants_hidden(tuner):
        routing.hidden = _first_pass(tuner, decoder, args, kwargs)


def _follow_beams(routing: Routing, cache: Any) -> None:
    """Let the routers' running means go where a new cache's rows go when beam search reorders them."""
    if "reorder_cache" in vars(cache):
        return  # a cache that was emptied and is filled again follows already
    reorder = cache.reorder_cache

    def both(order: Tensor) -> None:
        reorder(order)
        routing.reorder_pools(order)

    cache.reorder_cache = both


def wants_hidden(tuner: "MixtureModel") -> bool:
    """Whether a router of an active adapter reads the hidden states of a first pass."""
    configs = [tuner.peft_config[name] for name in tuner.active_adapters if name in tuner.peft_config]
    return any(gate.input == "hidden" for config in configs for gate in config.gates_of_row.values())


def _first_pass(tuner: "MixtureModel", decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the decoder's last hidden states without adapters, (B, T, H), without gradient (X-LoRA's first pass).

    A cached pass would need a second cache for the plain model; it is refused, and `generate` runs without one.
    """
    if kwargs.get("past_key_values", kwargs.get("cache")) is not None:
        raise ValueError("this adapter reads a first pass of the whole text: generate with use_cache=False")
    layers = [module for module in decoder.modules() if isinstance(module, tuner.tuner_layer_cls)]
    enabled = [layer for layer in layers if not layer.disable_adapters]
    tuner.routing.is_first_pass = True
    for layer in enabled:
        layer.enable_adapters(False)
    try:
        with torch.no_grad():
            return decoder(*args, **{**kwargs, "use_cache": False}).last_hidden_state
    finally:
        tuner.routing.is_first_pass = False
        for layer in enabled:
            layer.enable_adapters(True)


__all__ = ["wants_hidden", "watch_passes"]
