"""ROUGE-L of a written answer, by the `rouge-score` library (an optional extra)."""

import importlib
import importlib.util
from collections.abc import Callable

from qd2mora.errors import InputRefused


def rouge_l() -> Callable[[str, str], float]:
    """Return a function (right answer, written answer) to ROUGE-L's F-measure, words stemmed. Raises InputRefused."""
    if importlib.util.find_spec("rouge_score") is None:
        raise InputRefused("metric: rouge needs rouge-score: pip install 'qd2mora[scores]'")
    scorer = importlib.import_module("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    return lambda right, written: float(scorer.score(right, written)["rougeL"].fmeasure)


__all__ = ["rouge_l"]
