"""Training: from a recipe to a run folder."""

from qd2mora.training.run import Trained, train

__all__ = ["Trained", "train"]
