"""Evaluation: asking a run, an export or a base, and scoring the answers."""

from qd2mora.evaluation.contrast import Contrast
from qd2mora.evaluation.evaluate import EvalOptions, evaluate, score_all
from qd2mora.evaluation.many_prompts import ManyOptions, generate_file
from qd2mora.evaluation.questions import AskedTask, Exam, ask, ask_held_out, ask_suite, check_exam
from qd2mora.evaluation.score import Record, Score, bootstrap
from qd2mora.evaluation.scoring import score_task
from qd2mora.evaluation.subject import Subject, open_subject
from qd2mora.evaluation.suites import SUITES, suite_task_names
from qd2mora.evaluation.talking import TalkOptions, chat, generate
from qd2mora.evaluation.ways import Way, contrast_of, ensemble_of, way_of

__all__ = [
    "SUITES",
    "AskedTask",
    "Contrast",
    "EvalOptions",
    "Exam",
    "ManyOptions",
    "Record",
    "Score",
    "Subject",
    "TalkOptions",
    "Way",
    "ask",
    "ask_held_out",
    "ask_suite",
    "bootstrap",
    "chat",
    "check_exam",
    "contrast_of",
    "ensemble_of",
    "evaluate",
    "generate",
    "generate_file",
    "open_subject",
    "score_all",
    "score_task",
    "suite_task_names",
    "way_of",
]
