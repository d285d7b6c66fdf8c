"""What every section of a recipe is made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MOST = 10**9
"""More of anything is a slip, and beyond it lie the limits of NumPy, torch and a day's clock."""
MOST_EXPERTS = 4096
SMALLEST, LARGEST = 1e-30, 1e30
"""Between them a number and its square root, or its quotient by a rank, are numbers in float32 and bfloat16 too."""

Count = Annotated[int, Field(ge=1, le=MOST)]
Whole = Annotated[int, Field(ge=0, le=MOST)]
Size = Annotated[int, Field(ge=1, le=2**20)]
"""Of what is held at once: ranks, experts, widths, rows of a batch."""
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(ge=SMALLEST, le=LARGEST)]
NotNegative = Annotated[float, Field(ge=0, le=LARGEST)]
Epochs = Annotated[float, Field(ge=1e-9, le=MOST)]

# Errors name places in one line.
Place = Annotated[str, Field(min_length=1, pattern=r"^[^\p{Cc}\p{Zl}\p{Zp}]*$")]


class Section(BaseModel):
    """A part of the recipe: frozen, strict types, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


__all__ = [
    *("LARGEST", "MOST", "MOST_EXPERTS", "SMALLEST"),
    *("Count", "Epochs", "Fraction", "NotNegative", "Place", "Positive", "Section", "Size", "Whole"),
]
