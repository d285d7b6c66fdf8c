"""What a run folder holds, read for a report: whatever is missing or damaged is left out and named."""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qd2mora.inspection import inspect_run, read_routing
from qd2mora.inspection.content import write_routing
from qd2mora.inspection.run import ROWS_OF_A_TASK
from qd2mora.recipe import Recipe
from qd2mora.run_folder import RunFolder, is_run, read_recipe


@dataclass
class RunFiles:
    """The content of a run's files; `steps` and `evaluations` are the lines of `metrics.jsonl`."""

    folder: RunFolder
    recipe: Recipe
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)
    routing: dict[str, Any] | None = None
    scores: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.folder.path.resolve().name

    @property
    def alarm(self) -> str | None:
        """What the last evaluation found wrong with the routing, else None."""
        if self.routing is not None:
            return self.routing["alarm"]
        return self.evaluations[-1].get("alarm") if self.evaluations else None

    def column(self, name: str) -> list[tuple[float, float]]:
        """Return one number of every logged step, by step."""
        return [(line["step"], line[name]) for line in self.steps if isinstance(line.get(name), int | float)]

    def evaluated(self, section: str, name: str) -> list[tuple[float, float]]:
        """Return one number of every evaluation, by step: `eval_loss` of a task, or a number of `routing`."""
        pairs = [(line["step"], line.get(section, {}).get(name)) for line in self.evaluations]
        return [(step, value) for step, value in pairs if isinstance(value, int | float)]


def read_run(path: str | Path) -> RunFiles:
    """Read a run folder, finished or not. Raises InputRefused where there is none, DamagedFile."""
    folder = RunFolder(Path(path))
    files = RunFiles(folder, read_recipe(path))
    files.routing = read_routing(folder)
    files.manifest = _json(folder.manifest, dict, files)
    files.scores = _json(folder.path / "scores.json", dict, files)
    files.export = _json(folder.export / "export_report.json", dict, files)
    samples = _json(folder.samples, list, files)
    files.samples = [sample for sample in samples if isinstance(sample, dict)]
    for line in _lines(folder.metrics, files):
        if isinstance(line.get("loss"), int | float) or "learning_rate" in line:
            files.steps.append(line)
        else:
            files.evaluations.append(line)
    return files


def look_at(
    path: str | Path, *, again: bool = False, rows: int = ROWS_OF_A_TASK, allow_changed: Collection[str] = ()
) -> RunFiles:
    """Read a run folder; where it is finished and has no routing report, or `again`, measure and write that first.

    Raises InputRefused, DamagedFile.
    """
    folder = RunFolder(Path(path))
    is_finished = is_run(path) and (folder.adapter / "adapter_model.safetensors").is_file()
    if again or (is_finished and not folder.routing.is_file()):
        write_routing(folder, inspect_run(path, rows=rows, allow_changed=allow_changed))
    return read_run(path)


def _json(path: Path, kind: Callable[[], Any], files: RunFiles) -> Any:
    """Return the content of a JSON file, an empty one where there is none or it is of another kind."""
    if not path.is_file():
        return kind()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if type(content) is not type(kind()):
        files.damaged.append(path.name)
        return kind()
    return content


def _lines(path: Path, files: RunFiles) -> list[dict[str, Any]]:
    """Return the lines that are objects with a step; a last one cut short by a kill is no damage."""
    if not path.is_file():
        return []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = []
    for number, text in enumerate(texts):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            found.append(line)
        elif number + 1 < len(texts) and path.name not in files.damaged:
            files.damaged.append(path.name)
    return found


__all__ = ["RunFiles", "look_at", "read_run"]
