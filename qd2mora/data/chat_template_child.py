"""Renders chat templates, alone in a process of its own: `chat_template.py` starts it and talks JSON lines with it.

The template is somebody's program. It runs in transformers' sandbox, with no environment, a bound on memory and on the
processor time of each answer; whatever it does beyond that ends this process, not the run.
"""

import importlib
import importlib.util
import json
import sys
from datetime import datetime
from types import ModuleType, TracebackType
from typing import Any

try:
    import resource
except ModuleNotFoundError:  # Windows bounds no process in this way: there the parent's clock alone ends it
    resource = None  # type: ignore[assignment]


def _say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say in one short line what went wrong: nobody reads the pipe until this process has ended."""
    print(f"{kind.__name__}: {_in_one_line(error)}", file=sys.stderr)


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error)[:300].split())


def main() -> None:
    """Read the settings, then a request a line; answer each with a line."""
    sys.excepthook = _say
    settings = json.loads(sys.stdin.readline())
    sys.path[:] = settings["path"]
    import jinja2

    chat_template_utils = _transformers_rendering()
    if settings["clock"] is not None:
        began = datetime.fromisoformat(settings["clock"])
        # What `strftime_now` of templates reads in transformers 5.24, which has no argument for it.
        chat_template_utils.datetime = type("Stopped", (datetime,), {"now": staticmethod(lambda: began)})
    _bound_memory(settings["memory"])
    print("ready", flush=True)
    for line in sys.stdin:
        _bound_time(settings["seconds"])
        try:
            request = json.loads(line) | settings["tokens"]
            texts, spans = chat_template_utils.render_jinja_template(**request, chat_template=settings["template"])
            is_short = sum(map(len, texts)) <= settings["longest"]
            answer = {"texts": texts, "spans": spans} if is_short else {"refused": "the text is too long"}
        except jinja2.exceptions.SecurityError:
            raise
        except jinja2.exceptions.TemplateError as error:
            answer = {"refused": _in_one_line(error)}
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            # What the template does with this conversation; another may suit it.
            answer = {"refused": f"{type(error).__name__}: {_in_one_line(error)}"}
        print(json.dumps(answer), flush=True)


def _transformers_rendering() -> Any:
    """Return transformers' module of chat templates, and as little of transformers beside it as it lets us."""
    name = "transformers.utils.chat_template_utils"
    # Its packages list all models and import the hub's client, 0.7 s at each start for a module that needs neither;
    # transformers 5.24 has no other door to it. So it is found in packages that hold nothing but their place.
    place = importlib.util.find_spec("transformers")
    assert place is not None and place.submodule_search_locations is not None
    for package, folder in (("transformers", ""), ("transformers.utils", "/utils")):
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [place.submodule_search_locations[0] + folder]
    try:
        return importlib.import_module(name)
    except (ImportError, AttributeError):  # a version that needs more of them
        for module in [each for each in sys.modules if each.partition(".")[0] == "transformers"]:
            del sys.modules[module]
        return importlib.import_module(name)


def _bound_memory(size: int) -> None:
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _bound_time(seconds: int) -> None:
    """Bound the processor time of what comes next."""
    if resource is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        until = int(used.ru_utime + used.ru_stime) + 1 + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (until, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
