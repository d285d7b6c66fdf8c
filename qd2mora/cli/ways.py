"""Options of verbs that write answers in ways of their own: contrasted, with others, or drawn and voted on."""

from pathlib import Path
from typing import Annotated

import typer

WeakModel = Annotated[
    str | None,
    typer.Option("--contrast", help="Write what sets the adapter apart from: base, top1 (expert) or uniform (gates)."),
]
Beta = Annotated[float | None, typer.Option(help="Strength of --contrast, else 0.5; 0 is greedy.")]
Alpha = Annotated[float | None, typer.Option(help="Of --contrast: least share of the likeliest's probability; 0.1.")]
Others = Annotated[
    str | None, typer.Option("--ensemble", help="Runs or adapters that answer beside the model, with commas.")
]
Calibrate = Annotated[Path | None, typer.Option(help="Of --ensemble: rows that each one's temperature is fitted on.")]
Triggers = Annotated[
    Path | None, typer.Option(help="Of --ensemble: YAML, words of each, which weigh it by the prompt.")
]
Mix = Annotated[str | None, typer.Option(help="Of --ensemble: composite, or switch from token to token.")]
Samples = Annotated[int, typer.Option(help="Answers to draw; what most of them say counts.", min=1, max=1024)]
Extract = Annotated[str | None, typer.Option(help="Pattern of what counts of an answer, such as '#### (.*)'.")]

GatesEvery = Annotated[
    int, typer.Option(help="Tokens of an answer that gates are decided for at once; 1 is exact.", min=1, max=1 << 20)
]


__all__ = ["Alpha", "Beta", "Calibrate", "Extract", "GatesEvery", "Mix", "Others", "Samples", "Triggers", "WeakModel"]
