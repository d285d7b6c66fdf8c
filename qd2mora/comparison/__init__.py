"""Comparison: was the mixture worth it? Methods of one size, on the same rows in the same order, each at its best rate.

Every arm trains as many parameters as the recipe's adapter, chooses its learning rate on rows apart from the test rows,
and is scored twice there: as trained, and as its best static export.
"""

from qd2mora.comparison.settings import ComparisonSettings

__all__ = ["ComparisonSettings"]
