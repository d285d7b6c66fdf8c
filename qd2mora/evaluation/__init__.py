"""Evaluation: asking a run, an export or a base, and scoring the answers."""

from qd2mora.evaluation.asked import AskedTask, ask_held_out, ask_suite
from qd2mora.evaluation.evaluate import evaluate, score_all, score_tasks, task_numbers
from qd2mora.evaluation.score import Record, Score, bootstrap
from qd2mora.evaluation.scoring import score_task
from qd2mora.evaluation.subject import Subject, open_subject
from qd2mora.evaluation.suites import SUITES, suite_task_names
from qd2mora.evaluation.talking import Sampling, chat, generate

__all__ = [
    "SUITES",
    "AskedTask",
    "Record",
    "Sampling",
    "Score",
    "Subject",
    "ask_held_out",
    "ask_suite",
    "bootstrap",
    "chat",
    "evaluate",
    "generate",
    "open_subject",
    "score_all",
    "score_task",
    "score_tasks",
    "suite_task_names",
    "task_numbers",
]
