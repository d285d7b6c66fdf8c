"""Table 1: every row trains as many parameters as it says, and the recipes are what the table writes."""

from pathlib import Path

import pytest
from table1_rows import MODELS, NAMES, ROWS, TableRow, content_of, recipe_of, yaml_of

from qd2mora.base import SHAPES
from qd2mora.evaluation import SUITES
from qd2mora.mixture import MixtureConfig
from qd2mora.mixture.counts import llama_linears, trainable_parameters
from qd2mora.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes" / "table1"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_trains_what_it_says_and_what_the_paper_prints(row: TableRow, model: str) -> None:
    recipe = recipe_of(row, model)
    shape = SHAPES[model]
    linears = llama_linears(shape.hidden, shape.intermediate, shape.hidden, shape.hidden)
    config = MixtureConfig.from_recipe(recipe.adapter, len(recipe.data.tasks))
    count = trainable_parameters(config, linears, shape.layers, shape.hidden)
    assert count == row.parameters
    assert round(count / 1e6, 1) == row.printed


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_recipes_that_come_along_are_the_tables(row: TableRow, model: str) -> None:
    path = RECIPES / f"{model}-{row.name}.yaml"
    assert path.read_text(encoding="utf-8") == yaml_of(row, model)
    assert load_recipe(path) == recipe_of(row, model)


def test_the_tables_are_whole() -> None:
    assert len(list(RECIPES.iterdir())) == len(ROWS) * len(MODELS) == 18
    assert NAMES == tuple(task.name for task in SUITES["commonsense"].tasks)
    files = [task["path"].split("/")[1] for task in content_of(ROWS[0], "llama-7b")["data"]["tasks"]]
    assert files == [task.file for task in SUITES["commonsense"].tasks]
