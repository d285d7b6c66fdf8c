"""The verb on a reward model: reward."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from qd2mora.cli.app import AsJson, RunPath, app
from qd2mora.stopping import listening
from qd2mora.terminal import Screen


@app.command()
def reward(
    run: RunPath,
    file: Annotated[Path, typer.Option(help="Rows with prompt and answer, or answers.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="jsonl file for every answer with its reward and rank.")] = None,
    task: Annotated[
        str | None, typer.Option(help="As whose rows of the run they are scored; the first task's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score answers with a reward run, rank those to one prompt, and pick the best of each."""
    from qd2mora.evaluation.rewards import score_answers
    from qd2mora.report import show_rewards

    with listening("nothing was written, run the command again"):
        found = score_answers(run, file, out, task)
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found], indent=1))
    else:
        show_rewards(found, Screen())


__all__ = ["reward"]
