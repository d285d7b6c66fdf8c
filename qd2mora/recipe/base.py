"""The recipe's base section: the frozen model."""

from typing import Literal

from qd2mora.recipe.section import Place, Section


class Base(Section):
    """The frozen model."""

    model: Place
    """A folder, a hub id, or `random:SHAPE` (random weights of a named shape, for planning and benches)."""
    quantization: Literal["nf4", "none"] = "nf4"
    """`nf4`: bitsandbytes 4-bit linears; `none`: weights in the compute dtype."""
    double_quant: bool = True
    """Quantise the block maxima too: 4.127 instead of 4.5 bits a weight."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 where the device is fast at it, else float16 on a GPU and float32 on a CPU."""
    cache: Literal["auto", "none"] | Place = "auto"
    """A folder that keeps 4-bit weights, so that a later start need not quantise again; `auto`: `quantised/` beside the
    run, from half a GiB on; `none`."""


__all__ = ["Base"]
