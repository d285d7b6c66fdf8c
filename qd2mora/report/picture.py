"""A run in one PNG, for slides and chats: losses, likeness of experts, entropy, gates by task. Needs matplotlib."""

import importlib.util
from pathlib import Path
from typing import Any

from qd2mora.errors import InputRefused
from qd2mora.report.charts import smoothed
from qd2mora.report.run_files import RunFiles


def figure_for(out: Path, size: tuple[float, float]) -> Any:
    """Return an empty figure, inches, that may be written there. Raises InputRefused."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputRefused("--png: matplotlib is not installed; pip install 'qd2mora[figures]'")
    if out.suffix != ".png" or out.is_dir() or not out.parent.is_dir():
        raise InputRefused(f"--png: '{out}' will not do: name a .png file in a folder that is there")
    from matplotlib.figure import Figure  # not pyplot: no screen, no state

    return Figure(figsize=size, layout="constrained")


def draw_run(files: RunFiles, out: Path) -> None:
    """Write the picture. Raises InputRefused where matplotlib or the folder is missing."""
    figure = figure_for(out, (13, 8))
    axes = figure.subplots(2, 2)
    figure.suptitle(f"{_plain(files.name)}: {files.recipe.adapter.method}")
    _losses(axes[0][0], files)
    _likeness(axes[0][1], files)
    routers = [] if files.routing is None else [each for each in files.routing["routers"] if each["experts"] > 1]
    _entropy(axes[1][0], routers)
    _usage(axes[1][1], files, routers)
    figure.savefig(out, dpi=110)


def _losses(ax: Any, files: RunFiles) -> None:
    curves = {"training": smoothed(files.column("loss"))}
    curves |= {task.name: files.evaluated("eval_loss", task.name) for task in files.recipe.data.tasks}
    _lines(ax, curves, "loss in nats a token: training, and held-out by task", "step")
    if all(value > 0 for points in curves.values() for _, value in points):
        ax.set_yscale("log")


def _likeness(ax: Any, files: RunFiles) -> None:
    pairs = {} if files.routing is None else files.routing["pairs"]
    curves = {
        f"{bank} experts": [(step, half / pairs[bank]) for step, half in files.column(f"penalty_{bank}")]
        for bank in ("down", "up")
        if pairs.get(bank)
    }
    _lines(ax, curves, "mean |cos| of two experts of a bank", "step")
    ax.set_ylim(0, 1)


def _entropy(ax: Any, routers: list[dict[str, Any]]) -> None:
    curves: dict[str, list[tuple[float, float]]] = {}
    for router in routers:
        curves.setdefault(f"{router['kind']} {router['role']}", []).append((router["layer"], router["entropy"]))
    _lines(ax, curves, "entropy of single tokens' gates", "layer", ".-")
    ax.set_ylim(0, 1.02)


def _usage(ax: Any, files: RunFiles, routers: list[dict[str, Any]]) -> None:
    """Draw the router that tells tasks apart most."""
    if not routers or files.routing is None:
        ax.set_axis_off()
        return
    router = max(routers, key=lambda each: each["mutual_information_of_weights"])
    rows = [(task, row) for task, row in zip(files.routing["tasks"], router["usage"], strict=True) if row is not None]
    picture = ax.imshow([row for _, row in rows], cmap="viridis", aspect="auto")
    ax.set_yticks(range(len(rows)), [_plain(task) for task, _ in rows])
    ax.set_xticks(range(router["experts"]))
    ax.set_xlabel("expert")
    ax.set_title(
        _plain(f"mean gates by task: {router['module']} {router['role']}, which tells tasks apart most"), fontsize=10
    )
    ax.figure.colorbar(picture, ax=ax)


def _lines(ax: Any, curves: dict[str, list[tuple[float, float]]], title: str, x_name: str, look: str = "-") -> None:
    for name, points in curves.items():
        if points:
            ax.plot(*zip(*points, strict=True), look, label=_plain(name))
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(x_name)
    if ax.lines:
        ax.legend(fontsize=7, ncols=2)


def _plain(text: str) -> str:
    """Return text that is not read as mathematics."""
    return text.replace("$", r"\$")


__all__ = ["draw_run", "figure_for"]
