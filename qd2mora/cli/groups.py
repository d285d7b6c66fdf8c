"""Options in groups: a verb takes a dataclass, the command line its fields, each annotated as typer wants it.

typer knows functions alone, so that a verb of twenty options would have twenty parameters, and a second verb that takes
the same ones would write them down again.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any


def grouped(verb: Callable[..., None]) -> Callable[..., None]:
    """Return a verb whose parameters are the fields, in place of each parameter that is annotated with a dataclass.

    A field has the name, the default and the place that a parameter would have had. What is returned may be called
    with fields by their name.
    """
    groups: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(verb).parameters.items():
        if isinstance(parameter.annotation, type) and is_dataclass(parameter.annotation):
            groups[name] = parameter.annotation
            parameters += inspect.signature(parameter.annotation).parameters.values()
        else:
            # A group behind an option has to be named, which is of no matter to a command line.
            parameters.append(parameter.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD))
    signature = inspect.Signature(parameters)

    @functools.wraps(verb)
    def spread(*given: Any, **named: Any) -> None:
        bound = signature.bind(*given, **named)
        bound.apply_defaults()
        values = bound.arguments
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        verb(**values)

    # typer reads the one for names, order and defaults, the other for types and help.
    vars(spread)["__signature__"] = signature
    spread.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
    return spread


__all__ = ["grouped"]
