"""lm-evaluation-harness on a routed model (an optional extra): its tasks, its prompts, its metrics, our forward pass.

The harness's own Hugging Face model would load the base alone or a PEFT adapter without our checks; this one asks an
opened subject, so that routers hear of padding and prompts as everywhere else.
"""

import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qd2mora.base.passes import last_states, output_head
from qd2mora.data import Row
from qd2mora.data.pair import Pair
from qd2mora.disk.durable import write_json
from qd2mora.errors import InputRefused
from qd2mora.evaluation.answer_file import HarnessFile, TaskNumbers, check_scores_place, digest
from qd2mora.evaluation.answering import batch_of
from qd2mora.evaluation.change import Change, asked_as
from qd2mora.evaluation.evaluate import EvalOptions
from qd2mora.evaluation.score import bootstrap
from qd2mora.evaluation.subject import Subject, model_mark, open_subject
from qd2mora.safekeeping.places import writing

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise InputRefused("--harness needs lm-evaluation-harness: pip install 'qd2mora[harness]'") from error

NEW_TOKENS = 256  # where a task does not say how many it wants
_NO_TEXT = Pair("", "")

Values = tuple[list[float], bool]
"""A metric's value of every row, and whether higher is better."""
Request = tuple[tuple[str, str], list[int], list[int]]


def run_harness(
    model: str | Path,
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    limit: int | None = None,
    how: EvalOptions | None = None,
) -> TaskNumbers:
    """Return the harness's numbers by task; `folder` holds task files (YAML) of one's own.

    Tasks are asked one after another; beside `how.out`, `*.tasks.json` holds the numbers of those that are done, and a
    start that finds it goes on with the others.

    Raises InputRefused where a task is not known or the adapter reads more of a row than its text.
    """
    how = how or EvalOptions()
    how.refuse_beams("--harness")
    manager = _manager(tasks, folder)
    place, kept = how.place, None
    if place is not None:
        kept = place.with_suffix(".tasks.json")
        check_scores_place(place, kept)
    with writing("--out", place, kept):
        subject = open_subject(model, how.allow_changed)
        _refuse_rows_with_more(subject)
        question = {"model": model_mark(model), "limit": limit, "lm_eval": version("lm_eval")}
        question["folder"] = digest(_own_files(folder))
        done = HarnessFile(kept, question)
        asked = HarnessModel(subject, how.rows_at_once)
        for name in tasks:
            if name not in done.results:
                done.add(name, _numbers(asked, name, manager, limit))
        results = {each: numbers for name in tasks for each, numbers in done.results[name].items()}
        if place is not None:
            write_json(place, results)
    return results


def harness_changes(
    model: str,
    against: str,
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    limit: int | None = None,
    how: EvalOptions | None = None,
) -> dict[str, Change]:
    """Return how the harness's numbers change from `against` to `model`, by task and metric, paired row by row.

    Metrics that are no mean over rows are left out. Raises InputRefused.
    """
    how = how or EvalOptions()
    how.refuse_beams("--harness")
    manager, found = _manager(tasks, folder), list[dict[str, Values]]()
    with writing("--out", how.place):
        for path in (against, model):
            with asked_as(model, path, how.allow_changed) as subject:
                _refuse_rows_with_more(subject)
                found.append(_values(HarnessModel(subject, how.rows_at_once), tasks, manager, limit))
        changes = {name: _change(found[0][name], now) for name, now in found[1].items()}
        if how.place is not None:
            write_json(how.place, {name: change.to_json() for name, change in changes.items()})
    return changes


def _values(asked: "HarnessModel", tasks: Sequence[str], manager: TaskManager, limit: int | None) -> dict[str, Values]:
    """Return of each task and metric the value of every row, and whether higher is better."""
    found = lm_eval.simple_evaluate(
        model=asked, tasks=list(tasks), limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    values: dict[str, Values] = {}
    for task, samples in found["samples"].items():
        # A row comes once for each way in which the task reads an answer out of a text.
        for read_by in dict.fromkeys(str(sample.get("filter", "none")) for sample in samples):
            own = [sample for sample in samples if str(sample.get("filter", "none")) == read_by]
            own.sort(key=lambda sample: int(sample["doc_id"]))
            for metric, is_higher in found["higher_is_better"][task].items():
                of_rows = [sample.get(metric) for sample in own]
                if is_higher is not None and of_rows and all(isinstance(each, bool | int | float) for each in of_rows):
                    name = f"{task} {metric}" + ("" if read_by == "none" else f", {read_by}")
                    values[name] = ([float(each) for each in of_rows], is_higher)
    return values


def _change(before: Values, now: Values) -> Change:
    (one, _), (two, is_higher) = before, now
    interval = bootstrap([late - early for early, late in zip(one, two, strict=True)])
    before_mean, now_mean = (sum(each) / len(each) for each in (one, two))
    # `Change` knows one metric whose fall is a gain; any other name is one whose rise is.
    return Change("harness" if is_higher else "loss", len(two), before_mean, now_mean, interval)


def _numbers(asked: "HarnessModel", name: str, manager: TaskManager, limit: int | None) -> TaskNumbers:
    found = lm_eval.simple_evaluate(
        model=asked, tasks=[name], limit=limit, task_manager=manager, bootstrap_iters=1000, log_samples=False
    )
    return {each: _plain(numbers) for each, numbers in found["results"].items()}


def _manager(tasks: Sequence[str], folder: str | Path | None) -> TaskManager:
    """Return who knows the tasks. Raises InputRefused where nobody does."""
    manager = None
    if folder is not None:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
    # Its own list of thousands takes seconds to read: only where one's own files do not do.
    if manager is None or not all(name in manager.all_tasks for name in tasks):
        manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown or not tasks:
        raise InputRefused(f"--harness: no task '{unknown[0] if unknown else ''}'; `lm-eval ls tasks` lists them")
    return manager


def _own_files(folder: str | Path | None) -> list[str]:
    """Return the contents of one's own task files."""
    if folder is None:
        return []
    return [path.read_text(encoding="utf-8") for path in sorted(Path(folder).rglob("*.yaml"))]


class HarnessModel(TemplateLM):
    """The harness's view of a subject."""

    def __init__(self, subject: Subject, rows_at_once: int) -> None:
        super().__init__()
        self.subject = subject
        self.tokenizer = subject.tokenizer
        self.rows_at_once = rows_at_once
        self.max_length = int(subject.plain.config.max_position_embeddings)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenise a text; with its begin token unless told otherwise."""
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens is not False)["input_ids"]
        return ids

    def _loglikelihood_tokens(self, requests: list[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        """Return of each continuation its log-likelihood and whether greedy decoding would write it."""
        rows = []
        for _, context, continuation in requests:
            # Cut on the left, as the harness does it: the continuation is what is weighed.
            ids = (context + continuation)[-self.max_length :]
            rows.append(Row(0, np.asarray(ids, dtype=np.int32), len(ids) - len(continuation), _NO_TEXT))
        order = sorted(range(len(rows)), key=lambda number: len(rows[number].ids))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for start in range(0, len(order), self.rows_at_once):
            numbers = order[start : start + self.rows_at_once]
            for number, result in zip(numbers, self._weigh([rows[each] for each in numbers]), strict=True):
                found[number] = result
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, read in windows that each predict every token once."""
        sums = []
        for request in requests:
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            parts: list[Request] = [(("", ""), *make_disjoint_window(window)) for window in windows]
            sums.append(sum(value for value, _ in self._loglikelihood_tokens(parts)))
        return sums

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continue each context greedily (or by its beams) up to the first of its stop texts."""
        written: list[str] = [""] * len(requests)
        wishes = [request.args for request in requests]
        order = sorted(range(len(wishes)), key=lambda number: (str(wishes[number][1]), len(wishes[number][0])))
        while order:
            same = [number for number in order if wishes[number][1] == wishes[order[0]][1]][: self.rows_at_once]
            order = [number for number in order if number not in same]
            for number, text in zip(same, self._continue([wishes[each] for each in same]), strict=True):
                written[number] = text
        return written

    @torch.no_grad()
    def _weigh(self, rows: list[Row]) -> list[tuple[float, bool]]:
        batch = batch_of(self.subject, rows, "right")
        self.subject.route(batch)
        states, head = last_states(self.subject.plain, batch), output_head(self.subject.plain)
        found = []
        for number, row in enumerate(rows):
            # Nothing predicts a text's first token.
            first, last = max(row.masked, 1), len(row.ids)
            logits = head(states[number, first - 1 : last - 1]).log_softmax(-1)
            targets = batch["input_ids"][number, first:last]
            total = float(logits.gather(-1, targets[:, None]).double().sum())
            found.append((total, bool((logits.argmax(-1) == targets).all())))
        return found

    def _continue(self, wishes: list[tuple[str, dict[str, Any]]]) -> list[str]:
        settings = wishes[0][1]
        stops = settings.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        # Half of the context at most, or a task that asks for very long answers would leave its prompt no room.
        room = min(int(settings.get("max_gen_toks", NEW_TOKENS)), self.max_length // 2)
        beams = int(settings.get("num_beams", 1))
        ids = [self.tok_encode(context)[-(self.max_length - room) :] for context, _ in wishes]
        rows = [Row(0, np.asarray(each, dtype=np.int32), len(each), _NO_TEXT) for each in ids]
        batch = batch_of(self.subject, rows, "left")
        self.subject.route(batch, copies=beams)
        tokens = self.subject.continue_texts(batch["input_ids"], batch["attention_mask"], room, beams)
        return [_until(text, stops) for text in self.subject.texts_of(tokens)]


def _until(text: str, stops: list[str]) -> str:
    return min((text.split(stop)[0] for stop in stops if stop), key=len, default=text)


def _refuse_rows_with_more(subject: Subject) -> None:
    if subject.run is None:
        return
    reads_task = subject.run.routers.reads_task and len(subject.run.recipe.data.tasks) > 1
    if reads_task or subject.run.vector_width is not None:
        method = subject.run.recipe.adapter.method
        raise InputRefused(f"--harness: {method} reads the task or a vector of each row, its tasks bring none")


def _plain(numbers: dict[str, object]) -> dict[str, str | int | float]:
    """Keep what JSON can hold."""
    return {
        name: value
        for name, value in numbers.items()
        if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    }


__all__ = ["HarnessModel", "harness_changes", "run_harness"]
