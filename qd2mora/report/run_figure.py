"""A run in one picture, for slides and chats: losses, likeness of experts, entropy, gates by task."""

from dataclasses import replace
from pathlib import Path

from qd2mora.report.figure import check_png, figure_svg, write_png
from qd2mora.report.routing_page import entropy_chart, likeness_chart, map_of, mapped_groups
from qd2mora.report.run_contents import RunContents
from qd2mora.report.run_page import held_out_chart, training_chart


def draw_run(run: RunContents, out: Path) -> None:
    """Write the picture. Raises InputRefused where the renderer or the folder is missing."""
    check_png(out)
    charts = [training_chart(run), held_out_chart(run), likeness_chart(run)]
    if run.routing is not None:
        routers = run.routing.routers
        charts += [entropy_chart(routers, role) for role in dict.fromkeys(router.role for router in routers)]
        groups = mapped_groups(run.routing)
        if groups:
            # Of all maps the one with the router that tells tasks apart most.
            telling = max(groups, key=lambda each: max(one.measures.mutual_information_of_weights for one in each))
            drawn = map_of(run.routing, telling)
            charts.append(replace(drawn, title=f"mean gates: {drawn.title}"))
    write_png(figure_svg(f"{run.name}: {run.recipe.adapter.method}", charts, columns=2), out)


__all__ = ["draw_run"]
