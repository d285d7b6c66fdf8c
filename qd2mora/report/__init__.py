"""What a person reads: tables of scores and exports, rows as the model sees them, the methods, and a run's ending."""

from qd2mora.report.endings import finish
from qd2mora.report.experts import show_suggestion, suggest_experts
from qd2mora.report.exports import show_export, verdict
from qd2mora.report.inspection import show_inspection
from qd2mora.report.methods import method_text, parameters_on_7b, show_methods
from qd2mora.report.picture import draw_run
from qd2mora.report.plan_picture import draw_plan
from qd2mora.report.rows import show_rows
from qd2mora.report.run_files import look_at, read_run
from qd2mora.report.run_page import write_page
from qd2mora.report.scores import show_harness, show_scores

__all__ = [
    "draw_plan",
    "draw_run",
    "finish",
    "look_at",
    "method_text",
    "parameters_on_7b",
    "read_run",
    "show_export",
    "show_harness",
    "show_inspection",
    "show_methods",
    "show_rows",
    "show_scores",
    "show_suggestion",
    "suggest_experts",
    "verdict",
    "write_page",
]
