"""Shapes of models by their names on the hub, so that a run can be planned without files, network or licence.

The table, `known_models.json`, holds what a configuration needs and the number of parameters that was published.
"""

import json
import re
from functools import cache
from importlib.resources import files
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

_TUNED = re.compile(r"(-(instruct|chat|it|base|hf|bnb-4bit|unsloth|2407|2501|2507))+$")
"""Ends of names that change no shape."""


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """Return the table: fields of a configuration, and `parameters`, by name."""
    content: dict[str, dict[str, Any]] = json.loads(
        files("qd2mora.base").joinpath("known_models.json").read_text(encoding="utf-8")
    )
    return content


def known_name(model: str) -> str | None:
    """Return the table's name of a hub id, whoever publishes it; None where it has none."""
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        return None
    name = model.rpartition("/")[2].lower().removeprefix("meta-")
    # Versions stand before what was tuned, or behind it: Phi-3-mini-4k-instruct, Mistral-7B-Instruct-v0.3.
    candidates = (name, _TUNED.sub("", name), re.sub(r"-(instruct|chat)(?=-v)", "", name))
    return next((each for each in candidates if each in known_models()), None)


def known_config(name: str) -> PreTrainedConfig:
    """Return the configuration of a model of the table."""
    fields = {key: value for key, value in known_models()[name].items() if key != "parameters"}
    # Families whose default pad token lies beyond a smaller vocabulary would complain.
    return AutoConfig.for_model(fields.pop("model_type"), pad_token_id=0, **fields)


__all__ = ["known_config", "known_models", "known_name"]
