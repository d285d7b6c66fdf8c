"""What is composed: folders of LoRAs and mixtures, and the weights they are given."""

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qd2mora.disk.sealed import read_manifest, verify_where_ours
from qd2mora.disk.untrusted import adapter_settings, check_adapter
from qd2mora.errors import DamagedFile, InputRefused
from qd2mora.mixture import MixtureConfig
from qd2mora.mixture.registration import MODEL_PREFIX
from qd2mora.mixture.trained_loras import TrainedLora, find_adapter, read_trained_loras
from qd2mora.recipe import Recipe
from qd2mora.run_folder import is_run, read_recipe

Settings = dict[str, object]
"""A base with its quantisation, as a recipe's section names them."""


def all_linears(loras: Sequence[TrainedLora]) -> list[str]:
    """Return the names of the linears that at least one LoRA adapts, sorted."""
    return sorted(set().union(*(lora.pairs for lora in loras)))


def read_loras(folders: Sequence[str]) -> list[TrainedLora]:
    """Read plain LoRAs that fit together. Raises InputRefused."""
    loras = read_trained_loras(list(folders), "compose")
    for name in all_linears(loras):
        shapes = {(lora.pairs[name][1].shape[0], lora.pairs[name][0].shape[1]) for lora in loras if name in lora.pairs}
        if len(shapes) > 1:
            raise InputRefused(f"compose: {name} has several sizes in these adapters: they are of different bases")
    return loras


def base_of(folders: Sequence[str]) -> str:
    """Return the base that adapters name. Raises InputRefused where they name several."""
    names = []
    for folder in map(adapter_folder, folders):
        names.append(str(adapter_settings(folder).get("base_model_name_or_path") or ""))
    if len(set(names)) > 1:
        raise InputRefused(f"compose: the adapters are of different bases: {', '.join(sorted(set(names)))}")
    return names[0]


def trained_on(folders: Sequence[str]) -> Settings | None:
    """Return the base, with its quantisation, that runs and exports say they are for; None where they do not agree."""
    found = [_trained_on(Path(folder)) for folder in folders]
    if any(each != found[0] for each in found):
        return None
    return found[0]


def _trained_on(folder: Path) -> Settings | None:
    if is_run(folder):
        return read_recipe(folder).base.model_dump()
    return (read_manifest(folder) or {}).get("base")


def check_base(key: str, recipe: Recipe, base: str) -> None:
    """Refuse a recipe whose base is not the adapters'. Raises InputRefused."""
    if Path(base).resolve() != Path(recipe.base.model).resolve() and base != recipe.base.model:
        raise InputRefused(f"{key}: the recipe's base is {recipe.base.model}, the adapters' {base}")


def is_mixture(folder: str) -> bool:
    """Tell whether a folder holds a mixture of this package's, and no plain LoRA."""
    content = adapter_settings(adapter_folder(folder))
    return content.get("peft_type") == "QD2MORA" and content.get("method") != "lora"


def read_mixture(folder: str) -> tuple[MixtureConfig, dict[str, dict[str, Tensor]]]:
    """Read a mixture's configuration and its tensors by linear and name. Raises InputRefused, DamagedFile."""
    path = adapter_folder(folder)
    verify_where_ours(path)
    check_adapter(path)
    if adapter_settings(path).get("peft_type") != "QD2MORA":
        raise InputRefused(f"'{folder}' is a plain LoRA; a mixture is needed")
    try:
        tensors = load_file(path / "adapter_model.safetensors")
        config = MixtureConfig.from_pretrained(str(path))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise DamagedFile(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    assert isinstance(config, MixtureConfig)
    linears: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.removeprefix(MODEL_PREFIX).rpartition(".")
        linears.setdefault(name, {})[kind] = tensor
    return config, linears


def adapter_folder(folder: str) -> Path:
    """Return where an adapter lies: the folder itself, or a run's `adapter`. Raises InputRefused."""
    found = find_adapter(Path(folder))
    if found is None:
        raise InputRefused(f"'{folder}' holds no adapter; name a run or an adapter's folder")
    return found


def read_weights(text: str | None, number: int) -> list[float]:
    """Read weights such as 0.7,0.3; left out, all are 1 / n. Raises InputRefused."""
    if text is None:
        return [1 / number] * number
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != number or not all(abs(each) < float("inf") for each in weights):
        raise InputRefused(f"--weights: '{text}' will not do: {number} numbers with commas, one for each adapter")
    return weights


__all__ = [
    "Settings",
    "adapter_folder",
    "all_linears",
    "base_of",
    "check_base",
    "is_mixture",
    "read_loras",
    "read_mixture",
    "read_weights",
    "trained_on",
]
