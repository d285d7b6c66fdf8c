"""The adapter on disk: PEFT's own layout, sealed, with the base it belongs to.

An adapter is a correction of one base in one quantisation. On another it still loads, and answers a little worse
without a word; so its manifest carries the base's fingerprint, and another base is refused unless told.
"""

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from qd2mora.base import fingerprint
from qd2mora.base.files import UNLOADABLE, first_line
from qd2mora.disk.durable import save_pretrained
from qd2mora.disk.file_hash import short_hash, size_and_hash
from qd2mora.disk.sealed import open_manifest, read_listed, seal_folder
from qd2mora.disk.staged import staged_folder
from qd2mora.disk.tensor_file import stored_tensors, tensor_at_hand, write_tensors
from qd2mora.errors import DamagedFile, InputRefused, NotFinite
from qd2mora.mixture import MixtureConfig
from qd2mora.mixture.counts import other_sizes
from qd2mora.mixture.registration import MODEL_PREFIX
from qd2mora.recipe import Base
from qd2mora.safekeeping.inventory import ADAPTER_NAMES, HEAD

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def base_identity(base: Base, mark: str | None = None) -> dict[str, str]:
    """Return what an adapter remembers of its base; `mark` is its fingerprint where it is known already."""
    quantization: str = base.quantization
    if base.quantization == "nf4" and base.double_quant:
        quantization = "nf4, double"
    return {"base": mark or fingerprint(base), "base.quantization": quantization}


def save_adapter(
    model: PeftModel, folder: Path, identity: Mapping[str, str], head: Mapping[str, Tensor] | None = None
) -> None:
    """Write the adapter, and the head that scores answers, whole or not at all, read back before it takes its name.

    Raises NotFinite, OSError, and DamagedFile where the disk gave back something else.
    """
    wanted = {name: tensor.detach().cpu() for name, tensor in _tensors_of(model).items()}
    checked = {**wanted, **{f"{HEAD}: {name}": tensor for name, tensor in (head or {}).items()}}
    bad = [name for name, tensor in checked.items() if not tensor.isfinite().all()]
    if bad:
        raise NotFinite(f"the adapter is not saved: {bad[0]} is not finite")
    with staged_folder(folder, ADAPTER_NAMES) as stage:
        with _no_search_for_the_base(), _no_card(model):
            save_pretrained(model, stage)
        names = [CONFIG, WEIGHTS]
        if head:
            write_tensors(stage / HEAD, [tensor_at_hand(name, tensor.detach().cpu()) for name, tensor in head.items()])
            names.append(HEAD)
        files = {name: size_and_hash(stage / name) for name in names}
        for name in files:
            # safetensors 0.8 makes files that others cannot read; the folder was made with the mask of this process.
            (stage / name).chmod(stage.stat().st_mode & 0o666)
        seal_folder(stage, files, {"identity": identity, "inventory": _inventory(wanted)})
        there = load_tensors((stage / WEIGHTS).read_bytes())
        if there.keys() != wanted.keys() or not all(there[name].equal(wanted[name]) for name in wanted):
            raise DamagedFile(f"{stage}: the adapter read back is not the one in memory")


def _tensors_of(model: PeftModel) -> dict[str, Tensor]:
    with _no_search_for_the_base():
        return dict(get_peft_model_state_dict(model))


@contextmanager
def _no_card(model: Any) -> Iterator[None]:
    """Keep PEFT from rendering a card of blanks with each adapter, a tenth of a small run's time.

    `push` writes one that tells of the run.
    """
    model.create_or_update_model_card = lambda folder: None
    try:
        yield
    finally:
        del model.create_or_update_model_card


@contextmanager
def _no_search_for_the_base() -> Iterator[None]:
    """Keep PEFT from warning that a base has no config.json to compare vocabularies with: a GGUF file has none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Could not find a config file")
        yield


def load_adapter(model: nn.Module, base: Base, folder: Path, allow_changed: Collection[str] = ()) -> PeftModel:
    """Put a saved adapter on its base. Raises DamagedFile, InputRefused."""
    manifest = open_manifest(folder, lambda name: not name.endswith(".md"))
    content = {name: read_listed(folder, manifest, name) for name in (CONFIG, WEIGHTS)}
    refuse_another_base(manifest["identity"], base_identity(base), allow_changed)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # refused below
            adapted = PeftModel.from_pretrained(model, str(folder))
    except (*UNLOADABLE, ImportError, AssertionError) as error:
        raise InputRefused(f"'{folder}' cannot be put on its base: {first_line(error)}") from error
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise InputRefused(f"'{folder}' cannot be put on its base: {first_line(error)}") from error
        first = next(line.strip() for line in str(error).splitlines() if "size mismatch" in line)
        raise DamagedFile(f"{folder / WEIGHTS} does not hold the tensors that {CONFIG} asks for: {first}") from error
    # PEFT 0.21 only warns of missing tensors, and takes those of another dtype.
    there = _inventory(load_tensors(content[WEIGHTS]))
    if there != manifest["inventory"] or there != _inventory(_tensors_of(adapted)):
        raise DamagedFile(f"{folder / WEIGHTS} does not hold the tensors that {CONFIG} asks for")
    return adapted


def load_foreign_adapter(model: nn.Module, folder: Path) -> PeftModel:
    """Put an adapter that anybody may have written on a base. Raises InputRefused where they do not go together."""
    stored = stored_tensors([folder / WEIGHTS])
    there = stored.keys()
    try:
        _refuse_other_sizes(model, folder, {name: tensor.shape for name, tensor in stored.items()})
        with warnings.catch_warnings():
            # What is missing is refused below; of merging and training nothing is asked.
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(model, str(folder))
        wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    except (*UNLOADABLE, RuntimeError, ImportError, AssertionError, NotImplementedError) as error:
        raise InputRefused(f"'{folder}' cannot be put on its base: {first_line(error)}") from error
    missing = sorted(wanted - there)
    if missing:
        raise InputRefused(f"{folder / WEIGHTS} does not hold '{missing[0]}', which {CONFIG} asks for")
    unread = sorted(name for name in there - wanted if ".lora_" in name or "mixture_" in name)
    if unread:
        raise InputRefused(f"{folder / WEIGHTS} holds '{unread[0]}', which {CONFIG} leaves out")
    return adapted


def _refuse_other_sizes(model: nn.Module, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a mixture whose configuration asks for other tensors than lie beside it, before any is made."""
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, MixtureConfig):
        return
    known = {name.removeprefix(MODEL_PREFIX): shape for name, shape in shapes.items()}
    for name, shape, wanted in other_sizes(config, model, known):
        raise InputRefused(
            f"{folder / WEIGHTS} holds '{name}' of {list(shape)}, and {CONFIG} asks for {list(wanted)}: one of the "
            "two is of another adapter"
        )


def refuse_another_base(before: Mapping[str, str], now: Mapping[str, str], allowed: Collection[str]) -> None:
    """Compare an adapter's base with the one it is put on. Raises InputRefused."""
    for name, value in now.items():
        if before[name] != value and name not in allowed:
            was, found = short_hash(before[name]), short_hash(value)
            raise InputRefused(
                f"{name}: the adapter was trained on {was}, this is {found}; give it back its base, or insist with "
                f"--allow-changed {name}"
            )


def _inventory(tensors: Mapping[str, Tensor]) -> dict[str, list[object]]:
    """Return dtype and shape by name as JSON gives them back; the dtypes are torch's words, and stay so."""
    return {
        name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in sorted(tensors.items())
    }


__all__ = ["HEAD", "base_identity", "load_adapter", "load_foreign_adapter", "refuse_another_base", "save_adapter"]
