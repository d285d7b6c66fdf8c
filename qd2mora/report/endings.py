"""A run's ending: export and score as the recipe says, then tell where everything lies."""

import shutil
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from qd2mora.data import prepare
from qd2mora.evaluation import open_subject, score_tasks
from qd2mora.merging import merge
from qd2mora.mixture import MixtureConfig
from qd2mora.mixture.method import TASK
from qd2mora.recipe import Recipe
from qd2mora.report.exports import show_export
from qd2mora.report.run_files import look_at
from qd2mora.report.run_page import write_page
from qd2mora.report.samples import Samples
from qd2mora.report.scores import show_scores
from qd2mora.run_folder import RunFolder, read_recipe, write_json


def finish(run: Path, console: Console) -> None:
    """End a training: export and score as the recipe's `finish` says, then tell where everything lies."""
    folder, recipe = RunFolder(run), read_recipe(run)
    lies = {"adapter": folder.adapter, "recipe": folder.recipe, "metrics": folder.metrics}
    config = MixtureConfig.from_recipe(recipe.adapter, len(recipe.data.tasks))
    by_task = config.depends_on == TASK and config.reads_task and len(recipe.data.tasks) > 1
    if recipe.finish.export and (by_task or config.reads_vector):
        which = "--vector NUMBERS" if config.reads_vector else "--task NAME"
        console.print(f"no export: this method routes by row; `qd2mora merge {which}` exports for one")
    elif recipe.finish.export and config.row.placement == "block":
        console.print("no export: this method stands beside a whole block, and no weight can take its update")
    elif recipe.finish.export:
        shutil.rmtree(folder.export, ignore_errors=True)
        show_export(merge(run, folder.export), folder.export, console)
        lies["fp16 export"] = folder.export
    if recipe.finish.score:
        _score_all(folder, recipe, console)
        lies["scores"] = run / "scores.json"
    lies["report"] = write_page(look_at(run))
    for name, path in lies.items():
        console.print(f"{name:12} {path}", highlight=False, soft_wrap=True)


def _score_all(folder: RunFolder, recipe: Recipe, console: Console) -> None:
    subject = open_subject(folder.path)
    tasks = prepare(recipe.data, subject.tokenizer, recipe.train.seed)
    columns = {}
    samples = Samples(tasks)
    with subject.without_adapter():
        columns["base"] = score_tasks(subject, tasks)
        samples.ask("base", subject)
    columns["adapter"] = score_tasks(subject, tasks)
    samples.ask("adapter", subject)
    if folder.export.is_dir():
        export = replace(open_subject(folder.export), run=None)
        columns["fp16 export"] = score_tasks(export, tasks)
        samples.ask("fp16 export", export)
    if not columns["base"]:
        console.print("nothing to score: no task holds out rows (data.tasks.0.validation=100)")
        return
    show_scores(columns, console)
    content = {name: {task: score.to_json() for task, score in scores.items()} for name, scores in columns.items()}
    write_json(folder.path / "scores.json", content)
    write_json(folder.samples, samples.content)


__all__ = ["finish"]
