"""A run's ending: export and score as the recipe says, then tell where everything lies."""

from pathlib import Path

from rich.console import Console

from qd2mora.disk.owned import foreign_in
from qd2mora.disk.staged import remove_folder
from qd2mora.errors import InputRefused
from qd2mora.evaluation.earlier_tasks import score_earlier
from qd2mora.evaluation.run_scores import score_run
from qd2mora.inspection import inspect_where_due
from qd2mora.merging import merge
from qd2mora.merging.export_scope import export_scope
from qd2mora.mixture import MixtureConfig
from qd2mora.recipe import Recipe
from qd2mora.report import read_run, show_export, show_scores, write_page
from qd2mora.run_folder import RunFolder, read_recipe

WHY_NO_EXPORT = {
    "task": "no export: this method routes by row; `qd2mora merge --task NAME` exports for one",
    "vector": "no export: this method routes by row; `qd2mora merge --vector NUMBERS` exports for one",
    "spans": "no export: this method acts in marked spans alone, which no weight tells from the rest of a text",
    "magnitudes": "no export: DoRA experts scale the base's own output by token, which no weight and no code file does",
    "none": "no export: this method stands beside a whole block, and no weight can take its update",
}


def finish(run: Path, console: Console) -> None:
    """End a training: export and score as the recipe's `finish` says, then tell where everything lies."""
    folder, recipe = RunFolder(run), read_recipe(run)
    lies = {"adapter": folder.adapter, "recipe": folder.recipe, "metrics": folder.metrics}
    if recipe.finish.export and _export(folder, recipe, console):
        lies["fp16 export"] = folder.export
    if recipe.finish.score:
        _score(folder, recipe, console)
        lies["scores"] = folder.scores
    inspect_where_due(run)
    contents = read_run(run)
    lies["report"] = write_page(contents)
    if contents.advice:
        console.print(f"note: {contents.advice}", highlight=False, soft_wrap=True)
    for name, path in lies.items():
        console.print(f"{name:12} {path}", highlight=False, soft_wrap=True)


def _export(folder: RunFolder, recipe: Recipe, console: Console) -> bool:
    """Export ordinary weights, or say why none can serve every row."""
    num_tasks = len(recipe.data.tasks)
    scope = export_scope(MixtureConfig.from_recipe(recipe.adapter, num_tasks), num_tasks)
    if scope != "all":
        console.print(WHY_NO_EXPORT[scope])
        return False
    foreign = foreign_in(folder.export)
    if foreign is not None:
        console.print(f"no export: '{foreign}' was not written by one; move it elsewhere and `qd2mora merge` the run")
        return False
    if folder.export.is_dir():
        remove_folder(folder.export)
    show_export(merge(folder.path, folder.export), folder.export, console)
    return True


def _score(folder: RunFolder, recipe: Recipe, console: Console) -> None:
    scores = score_run(folder, recipe)
    if scores:
        show_scores(scores, console)
    else:
        console.print("nothing to score: no task holds out rows (data.tasks.0.validation=100)")
    try:
        earlier = score_earlier(folder, recipe)
    except InputRefused as error:  # the earlier run's data may be gone, which takes nothing from this one
        console.print(f"earlier tasks are not scored: {error}", highlight=False, soft_wrap=True)
        return
    if earlier:
        words = f"tasks of '{recipe.adapter.start}', which this run went on from:"
        console.print(words, highlight=False, soft_wrap=True)
        show_scores(earlier, console)


__all__ = ["finish"]
