"""Options of verbs that write answers in ways of their own: contrasted, with others, or drawn and voted on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from qd2mora.cli.app import words


@dataclass(frozen=True)
class WayOptions:
    """The model against itself without what sets it apart, or together with others."""

    contrast: Annotated[
        str | None,
        typer.Option(help="Write what sets the adapter apart from: base, top1 (expert) or uniform (gates)."),
    ] = None
    beta: Annotated[float | None, typer.Option(help="Strength of --contrast, else 0.5; 0 is greedy.")] = None
    alpha: Annotated[
        float | None, typer.Option(help="Of --contrast: least share of the likeliest's probability; 0.1.")
    ] = None
    ensemble: Annotated[
        str | None, typer.Option(help="Runs or adapters that answer beside the model, with commas.")
    ] = None
    calibrate: Annotated[
        Path | None, typer.Option(help="Of --ensemble: rows that each one's temperature is fitted on.")
    ] = None
    triggers: Annotated[
        Path | None, typer.Option(help="Of --ensemble: YAML, words of each, which weigh it by the prompt.")
    ] = None
    mix: Annotated[str | None, typer.Option(help="Of --ensemble: composite, or switch from token to token.")] = None

    def way(self, **settings: Any) -> Any:
        """Return the way that these and other settings ask for, None where they ask for none. Raises InputRefused."""
        from qd2mora.evaluation import contrast_of, ensemble_of, way_of

        others = None if self.ensemble is None else words(self.ensemble)
        together = ensemble_of(others, self.calibrate, self.triggers, self.mix)
        return way_of(contrast_of(self.contrast, self.beta, self.alpha), together, **settings)


Samples = Annotated[int, typer.Option(help="Answers to draw; what most of them say counts.", min=1, max=1024)]
Extract = Annotated[str | None, typer.Option(help="Pattern of what counts of an answer, such as '#### (.*)'.")]
GatesEvery = Annotated[
    int, typer.Option(help="Tokens of an answer that gates are decided for at once; 1 is exact.", min=1, max=1 << 20)
]


__all__ = ["Extract", "GatesEvery", "Samples", "WayOptions"]
