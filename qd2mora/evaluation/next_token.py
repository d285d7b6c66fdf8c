"""What is asked of the scores that a next token is chosen by: an answer chosen by none would look like any other."""

from typing import Any

from transformers import LogitsProcessor

from qd2mora.errors import NotFinite


class RefuseNotFinite(LogitsProcessor):
    """Raises NotFinite where a model gives a score that is no number or infinitely likely."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if bool((scores.isnan() | scores.isposinf()).any()):
            raise NotFinite(
                f"after {input_ids.shape[1]} tokens the model's scores are not finite: its weights are too large for "
                "its dtype, or damaged"
            )
        return scores


__all__ = ["RefuseNotFinite"]
