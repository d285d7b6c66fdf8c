"""What a person reads: tables of scores and exports, rows as the model sees them, the methods, the page of a run."""

from qd2mora.report.changes import show_changes, show_composite, show_sequence
from qd2mora.report.exports import show_export, verdict
from qd2mora.report.figure import check_png
from qd2mora.report.methods import method_text, parameters_on_7b, show_methods
from qd2mora.report.plan_figure import draw_plan
from qd2mora.report.preview import show_rows
from qd2mora.report.rewards import show_rewards
from qd2mora.report.run_contents import read_run
from qd2mora.report.run_figure import draw_run
from qd2mora.report.run_page import check_page, write_page
from qd2mora.report.run_summary import show_inspection
from qd2mora.report.scores import show_harness, show_scores
from qd2mora.report.suggestion import show_suggestion
from qd2mora.report.taxonomy import show_taxonomy

__all__ = [
    "check_page",
    "check_png",
    "draw_plan",
    "draw_run",
    "method_text",
    "parameters_on_7b",
    "read_run",
    "show_changes",
    "show_composite",
    "show_export",
    "show_harness",
    "show_inspection",
    "show_methods",
    "show_rewards",
    "show_rows",
    "show_scores",
    "show_sequence",
    "show_suggestion",
    "show_taxonomy",
    "verdict",
    "write_page",
]
