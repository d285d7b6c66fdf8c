"""qd2mora: mixtures of LoRA on 4-bit LLaMA models, from a recipe to plain fp16 weights.

`import qd2mora` registers the adapters with PEFT: at once where PEFT is already imported, else at the moment it is, so
that the import itself costs no torch.
"""

import os
import sys

# `python -m qd2mora` would take any module from the working folder first, which may be anybody's: an adapter's, say.
if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
    del sys.path[0]

import importlib
import importlib.util
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.1.0"

_LAZY = {
    "MixtureConfig": "qd2mora.mixture",
    "MixtureModel": "qd2mora.mixture",
    "load_recipe": "qd2mora.recipe",
    "plan": "qd2mora.memory.plan",
    "train": "qd2mora.training",
    "merge": "qd2mora.merging",
    "ExportOptions": "qd2mora.merging",
    "evaluate": "qd2mora.evaluation",
}


class _RegisterAfter(Loader):
    """PEFT's own loader, followed by our registration."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module("qd2mora.mixture")


class _PeftFinder(MetaPathFinder):
    """Finds `peft` once, as it would be found anyway, and adds the registration."""

    # PEFT 0.21 looks for no methods in other packages: no entry points, no list to add a name to before it is imported.
    # Ends with the first release that does. Importing PEFT here instead would make `qd2mora --help` wait for torch.
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("peft")
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'qd2mora' has no attribute '{name}'")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


if "peft" in sys.modules:
    importlib.import_module("qd2mora.mixture")
else:
    sys.meta_path.insert(0, _PeftFinder())

__all__ = [
    "ExportOptions",
    "MixtureConfig",
    "MixtureModel",
    "__version__",
    "evaluate",
    "load_recipe",
    "merge",
    "plan",
    "train",
]
