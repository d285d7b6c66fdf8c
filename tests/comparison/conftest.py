"""What tests of comparisons begin with."""

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="module")
def made(made: Path) -> Path:
    """The tiny base and tasks, and a recipe over them."""
    text = tiny.recipe_text(made / "base", made / "data", made / "run")
    (made / "recipe.yaml").write_text(text, encoding="utf-8")
    return made
