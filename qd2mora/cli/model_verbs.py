"""Verbs on a run or a model: merge, eval, verify."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from qd2mora.cli.app import MOST, AllowChanged, AsJson, ModelPath, RunPath, app, numbers, words
from qd2mora.cli.ways import Alpha, Beta, Calibrate, Extract, GatesEvery, Mix, Others, Samples, Triggers, WeakModel
from qd2mora.disk.sealed import MANIFEST
from qd2mora.errors import InputRefused
from qd2mora.stopping import listening
from qd2mora.terminal import Screen

ExamRecipe = Annotated[Path | None, typer.Option(help="Recipe whose held-out rows are asked.")]
Suite = Annotated[str | None, typer.Option(help="Published tests to ask instead: commonsense.")]
ExamData = Annotated[Path | None, typer.Option(help="Folder of the suite's test files or of harness tasks.")]
ExamTasks = Annotated[str | None, typer.Option(help="Only these tasks, with commas between.")]
Scoring = Annotated[str, typer.Option(help="Of a suite: generate, or likelihood of the choices.")]
SuitePrompt = Annotated[str, typer.Option(help="Of a suite: published, training's own, or cloze.")]
Beams = Annotated[int, typer.Option(help="1 is greedy; the commonsense tables use 4.", min=1, max=1024)]
HarnessTasks = Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, with commas.")]
Limit = Annotated[int | None, typer.Option(help="Rows of each task.", min=1, max=MOST)]
RowsAtOnce = Annotated[int, typer.Option(help="Rows of a batch; no score depends on it.", min=1, max=MOST)]
SampleTemperature = Annotated[float, typer.Option(help="Of --samples; else 0.7.")]
ScoresFile = Annotated[Path | None, typer.Option(help="JSON file for the scores; the same command goes on.")]


Strategy = Annotated[
    str, typer.Option(help="From routed to static: auto, core_lsq, distill, mean_gate, per_task or sequential.")
]
ForTask = Annotated[str | None, typer.Option(help="Export for this task alone; all: one export for each.")]
ForVector = Annotated[str | None, typer.Option(help="Export for rows with this vector: numbers with commas.")]
To = Annotated[str, typer.Option(help="hf or gguf: weights; lora or gguf_lora: a LoRA; exact: the routed model.")]
AddedTo = Annotated[str, typer.Option(help="Weights added to: dequantized (trained on) or original.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="hf: float16, bfloat16, float32; exact: these or nf4; LoRAs: float32, float16; gguf: float16, bfloat16, "
        "q8_0, q6_k, q5_k_m, q4_k_m, q4_0."
    ),
]
MaxShard = Annotated[str | None, typer.Option(help="hf and exact: size of one file of weights; 5GB where not given.")]
NoVocabulary = Annotated[
    bool, typer.Option("--no-vocabulary", help="GGUF for token ids alone, where llama.cpp lacks the tokenizer.")
]


PlanOnly = Annotated[bool, typer.Option("--plan", help="Say how long it may take, and make nothing.")]
Measure = Annotated[str | None, typer.Option(help="Held-out rows to measure on, or none; 512 where left out.")]


@app.command()
def merge(
    run: RunPath,
    out: Annotated[Path | None, typer.Option(help="New folder for the export.", show_default=False)] = None,
    strategy: Strategy = "auto",
    task: ForTask = None,
    vector: ForVector = None,
    to: To = "hf",
    base: AddedTo = "dequantized",
    dtype: Dtype = None,
    max_shard: MaxShard = None,
    no_vocabulary: NoVocabulary = False,
    measure: Measure = None,
    plan: PlanOnly = False,
    allow_changed: AllowChanged = None,
) -> None:
    """Export ordinary weights, a LoRA or the routed model itself, with a report of what the export keeps."""
    if plan:
        from qd2mora.merging.forecast import forecast

        with listening():
            rows, changed = _rows_to_measure(measure), tuple(allow_changed or ())
            Screen().print(forecast(run, strategy, task, rows, allow_changed=changed), soft_wrap=True, highlight=False)
        return
    if out is None:
        raise InputRefused("--out: name a new folder for the export")
    from qd2mora.merging import ExportOptions, merge_tasks
    from qd2mora.merging import merge as run_merge
    from qd2mora.report import show_export

    options = ExportOptions(
        strategy=strategy,
        task=task,
        vector=numbers(vector),
        to=to,
        base=base,
        dtype=dtype,
        max_shard=max_shard,
        with_vocabulary=not no_vocabulary,
        allow_changed=allow_changed or (),
        measured_rows=_rows_to_measure(measure),
    )
    with listening("no half of the output is left, run the command again"):
        if task == "all":
            exports = list(merge_tasks(run, out, options).values())
        else:
            exports = [run_merge(run, out, options)]
    for export in exports:
        show_export(export, export.folder, Screen())


def _rows_to_measure(text: str | None) -> int | None:
    """Return how many rows --measure asks for, 0 for none. Raises InputRefused."""
    if text is None:
        return None
    if text == "none":
        return 0
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text, re.ASCII):
        raise InputRefused(f"--measure: '{text}' will not do: a number of held-out rows, or none")
    return int(text)


@app.command(name="eval")
def evaluate(
    model: ModelPath,
    recipe: ExamRecipe = None,
    suite: Suite = None,
    data: ExamData = None,
    tasks: ExamTasks = None,
    scoring: Scoring = "generate",
    prompt: SuitePrompt = "published",
    beams: Beams = 1,
    harness: HarnessTasks = None,
    limit: Limit = None,
    rows_at_once: RowsAtOnce = 32,
    contrast: WeakModel = None,
    beta: Beta = None,
    alpha: Alpha = None,
    ensemble: Others = None,
    calibrate: Calibrate = None,
    triggers: Triggers = None,
    mix: Mix = None,
    samples: Samples = 1,
    temperature: SampleTemperature = 0.0,
    extract: Extract = None,
    gates_every: GatesEvery = 1,
    out: ScoresFile = None,
    as_json: AsJson = False,
    allow_changed: AllowChanged = None,
) -> None:
    """Score tasks: held-out rows by their own metric, a published suite, or the harness's tasks."""
    from qd2mora.evaluation import contrast_of, ensemble_of, way_of
    from qd2mora.report import show_harness, show_scores

    changed = allow_changed or ()
    others = None if ensemble is None else words(ensemble)
    together = ensemble_of(others, calibrate, triggers, mix)
    contrasted = contrast_of(contrast, beta, alpha)
    kept = {"samples": samples, "gates_every": gates_every}
    way = way_of(contrasted, together, temperature=temperature, extract=extract, **kept)
    if harness is not None and way is not None:
        raise InputRefused(
            "--contrast, --ensemble, --samples, --extract, --gates-every: the harness writes and reads by itself"
        )
    if harness is not None:
        from qd2mora.evaluation.harness import run_harness

        results = run_harness(
            model, words(harness), folder=data, limit=limit, rows_at_once=rows_at_once, out=out, allow_changed=changed
        )
        if as_json:
            typer.echo(json.dumps(results, indent=1))
        else:
            show_harness(results, Screen())
        return
    from qd2mora import evaluation

    exam = evaluation.Exam(recipe, suite, data, words(tasks), limit, scoring, prompt, way)
    scores = evaluation.evaluate(
        model, exam, beams=beams, rows_at_once=rows_at_once, out=out, allow_changed=changed, is_shown=True
    )
    if as_json:
        typer.echo(json.dumps({name: score.to_json() for name, score in scores.items()}, indent=1))
    else:
        show_scores({str(model): scores}, Screen())


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Run, adapter or export.", metavar="FOLDER", show_default=False)],
) -> None:
    """Read every file back and compare it with the hash it was written with: whole runs, adapters, exports."""
    from qd2mora.safekeeping.verification import verified

    num_found = 0
    for each in verified(folder):
        num_found += 1
        for line in each.said:
            typer.echo(f"{each.folder}: {line}")
        typer.echo(f"{each.folder}: whole, {each.num_bytes:,} bytes")
    if not num_found:
        raise InputRefused(f"'{folder}' holds no {MANIFEST} with hashes; name a run, an adapter or an export")


__all__ = ["evaluate", "merge", "verify"]
