"""What a run that goes on from another made of the earlier tasks: the same held-out rows, asked before and after."""

from pathlib import Path

from qd2mora.data import prepare
from qd2mora.disk.durable import write_json
from qd2mora.evaluation.evaluate import score_all
from qd2mora.evaluation.questions import ask_held_out
from qd2mora.evaluation.score import Score
from qd2mora.evaluation.subject import open_subject
from qd2mora.recipe import Recipe
from qd2mora.run_folder import RunFolder, clock_of, is_run, read_recipe
from qd2mora.safekeeping.inventory import noted


def score_earlier(folder: RunFolder, recipe: Recipe) -> dict[str, dict[str, Score]]:
    """Score the tasks of the run that this one went on from, as it was and as it is now; write `earlier_tasks.json`.

    Nothing is written, and nothing returned, where it went on from no run, or from one that holds out no rows. Raises
    InputRefused, also where that run's data is gone, DamagedFile, NotFinite.
    """
    start = recipe.adapter.start
    if start is None or not is_run(start):
        return {}
    before, now = open_subject(start), open_subject(folder.path)
    earlier = read_recipe(start)
    tasks = prepare(earlier.data, before.tokenizer, earlier.train.seed, clock_of(RunFolder(Path(start))))
    asked = ask_held_out(tasks)
    if not asked:
        return {}
    scores = {"before": score_all(before, asked, is_shown=True), "now": score_all(now, asked, is_shown=True)}
    by_model = {name: {task: score.to_json() for task, score in by_task.items()} for name, by_task in scores.items()}
    with noted(folder.earlier_tasks):
        write_json(folder.earlier_tasks, by_model)
    return scores


__all__ = ["score_earlier"]
