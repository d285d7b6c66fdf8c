"""A run in one picture, for slides and chats: losses, likeness of experts, entropy, gates by task."""

from pathlib import Path

from qd2mora.report.curves import line_chart
from qd2mora.report.figure import Panel, check_png, figure_svg, write_png
from qd2mora.report.routing_page import entropy_chart, likeness_lines, map_of, mapped_groups
from qd2mora.report.run_contents import RunContents
from qd2mora.report.run_page import loss_lines, task_lines


def draw_run(run: RunContents, out: Path) -> None:
    """Write the picture. Raises InputRefused where the renderer or the folder is missing."""
    check_png(out)
    title = f"{run.name}: {run.recipe.adapter.method}"
    write_png(figure_svg(title, _panels(run), columns=2), out)


def _panels(run: RunContents) -> list[Panel]:
    held_out = task_lines(run, lambda line: line.eval_loss)
    likeness = line_chart("likeness of experts", likeness_lines(run), low=0.0, high=1.0)
    panels = [
        Panel("training loss in nats a token", line_chart("training loss", loss_lines(run), is_log=True)),
        Panel("held-out loss in nats a token", line_chart("held-out loss", held_out, is_log=True)),
        Panel("mean |cos| of two experts of a bank", likeness),
    ]
    if run.routing is not None and run.routing.routers:
        for role in dict.fromkeys(router.role for router in run.routing.routers):
            chart = entropy_chart(run.routing.routers, role)
            panels.append(Panel(f"entropy of single tokens' gates: {role}", chart))
        panels += _most_telling_map(run)
    return panels


def _most_telling_map(run: RunContents) -> list[Panel]:
    """Return the heat map with the router that tells tasks apart most."""
    assert run.routing is not None
    groups = mapped_groups(run.routing)
    if not groups:
        return []
    chosen = max(groups, key=lambda group: max(each.measures.mutual_information_of_weights for each in group))
    return [Panel(f"mean gates by task and layer: {chosen[0].kind}, {chosen[0].role}", map_of(run.routing, chosen))]


__all__ = ["draw_run"]
