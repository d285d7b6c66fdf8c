"""A finished run beside its base and its export: each scored on the held-out rows, with a few answers to read."""

from dataclasses import asdict, replace

from qd2mora.data import prepare
from qd2mora.disk.durable import write_json
from qd2mora.evaluation.evaluate import score_all
from qd2mora.evaluation.questions import ask_held_out, ask_judged
from qd2mora.evaluation.samples import answer_samples, sampled_rows
from qd2mora.evaluation.score import Score
from qd2mora.evaluation.subject import open_subject
from qd2mora.recipe import Recipe
from qd2mora.run_folder import RunFolder, clock_of
from qd2mora.safekeeping.inventory import noted


def score_run(folder: RunFolder, recipe: Recipe) -> dict[str, dict[str, Score]]:
    """Score base, adapter and, where there is one, export by task; write `scores.json` and `samples.json`.

    Nothing is written, and nothing returned, where no task holds out rows. Raises InputRefused, DamagedFile, NotFinite.
    """
    subject = open_subject(folder.path)
    tasks = prepare(recipe.data, subject.tokenizer, recipe.train.seed, clock_of(folder))
    asked = ask_held_out(tasks) + ask_judged(recipe, tasks, subject)
    rows = sampled_rows(tasks)
    if not asked:
        return {}
    with subject.without_adapter():
        scores = {"base": score_all(subject, asked, is_shown=True)}
        answer_samples("base", subject, rows)
    models = {"adapter": subject}
    if folder.export.is_dir():
        models["fp16 export"] = replace(open_subject(folder.export), run=None)
    for name, model in models.items():
        scores[name] = score_all(model, asked, is_shown=True)
        answer_samples(name, model, rows)
    by_model = {name: {task: score.to_json() for task, score in by_task.items()} for name, by_task in scores.items()}
    with noted(folder.scores, folder.samples):
        write_json(folder.scores, by_model)
        write_json(folder.samples, [asdict(sample) for _, sample in rows])
    return scores


__all__ = ["score_run"]
