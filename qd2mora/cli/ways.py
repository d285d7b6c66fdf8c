"""Options of verbs that write answers in ways of their own: contrasted, with others, or drawn and voted on."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qd2mora.cli.app import words

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


def asked_way(
    contrast: tuple[str | None, float | None, float | None],
    ensemble: tuple[str | None, Path | None, Path | None, str | None],
    **settings: Any,
) -> Any:
    """Return the way that options ask for, None where they ask for none; each tuple in the order above.

    Raises InputRefused.
    """
    from qd2mora.evaluation import contrast_of, ensemble_of, way_of

    others, calibrate, triggers, mix = ensemble
    together = ensemble_of(None if others is None else words(others), calibrate, triggers, mix)
    return way_of(contrast_of(*contrast), together, **settings)


__all__ = [
    "Alpha",
    "Beta",
    "Calibrate",
    "Extract",
    "GatesEvery",
    "Mix",
    "Others",
    "Samples",
    "Triggers",
    "WeakModel",
    "asked_way",
]
