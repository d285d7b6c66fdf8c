"""What one static export of an adapter can serve."""

from typing import Literal

from qd2mora.mixture import MixtureConfig
from qd2mora.routed.gate import TASK

ExportScope = Literal["all", "task", "vector", "spans", "magnitudes", "none"]


def export_scope(config: MixtureConfig, num_tasks: int) -> ExportScope:
    """Say which rows one export serves: all, those of one task or of one vector; none where no weight can hold it.

    `spans`: none either, because it acts in parts of rows; `magnitudes`: nor where experts scale the base's own output.
    """
    if config.routers.reads_spans:
        return "spans"
    if config.row.placement == "block":
        return "none"
    if config.experts is not None:
        return "magnitudes"
    if config.routers.reads_vector:
        return "vector"
    if config.routers.depends_on == TASK and config.routers.reads_task and num_tasks > 1:
        return "task"
    return "all"


__all__ = ["ExportScope", "export_scope"]
