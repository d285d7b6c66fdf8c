"""How many experts a recipe's prompts ask for, as tables."""

from rich.console import Console
from rich.table import Table

from qd2mora.data.expert_suggestion import ExpertSuggestion
from qd2mora.report.cells import with_columns


def show_suggestion(found: ExpertSuggestion, console: Console) -> None:
    """Print a suggestion and the numbers behind it."""
    tried = with_columns(Table(title=f"clusters of {found.prompts} prompts"), ("clusters", "inertia", "silhouette"))
    tried.columns[0].justify = "right"
    for each in found.tried:
        tried.add_row(str(each.k), f"{each.inertia:.1%}", f"{each.silhouette:.3f}")
    console.print(tried)
    clusters = [str(number + 1) for number in range(found.experts)]
    members = with_columns(Table(title=f"prompts of each task in the {found.experts} clusters"), ["task", *clusters])
    for task, counts in found.tasks.items():
        members.add_row(task, *map(str, counts))
    console.print(members)
    console.print(
        f"suggested: adapter.up.experts={found.experts} (best silhouette, {found.silhouette:.3f}); "
        f"the elbow of the inertia is at {found.elbow}",
        highlight=False,
    )
    if found.is_weak:
        console.print("the clusters overlap much: take this as a hint, and compare", highlight=False)


__all__ = ["show_suggestion"]
