"""What is asked: a run with its routed adapter, or any model folder."""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from pydantic import ValidationError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qd2mora.adapter_folder import load_foreign_adapter
from qd2mora.base import compute_dtype, default_device, ends_alone, fingerprint, load_base, load_tokenizer
from qd2mora.base.files import is_gguf
from qd2mora.data.chat import named_templates
from qd2mora.data.tokenise import Tokeniser
from qd2mora.disk.file_hash import hash_of_bytes, hash_of_file, hashes_of_files
from qd2mora.disk.sealed import MANIFEST, read_manifest, verify_where_ours
from qd2mora.disk.tensor_file import check_finite
from qd2mora.disk.untrusted import check_adapter, check_config, check_weights
from qd2mora.errors import InputRefused
from qd2mora.evaluation.ends import Ends, ends_of
from qd2mora.evaluation.next_token import RefuseNotFinite
from qd2mora.mixture import MixtureConfig, adapter_off, forgoes_cache, read_rows, shortcuts
from qd2mora.recipe import Base
from qd2mora.routed.gate import TOKEN
from qd2mora.routed.modeling_mixture import CONFIGS, SUFFIX, MixtureForCausalLM, auto_map, classes_of
from qd2mora.run_folder import BaseOf, OpenRun, RunFolder, is_run, open_run

_BASE = "base_model_name_or_path"


SPANS_ARE_MISSING = (
    "this adapter acts in marked spans alone, which nothing can mark here; rows of a recipe with data.spans can, and "
    "qd2mora generate RUN --prompt ... --span"
)


@dataclass(frozen=True)
class Subject:
    """A model that answers; `model` is a PeftModel where it has an adapter and a plain transformers model otherwise."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    run: OpenRun | None = None
    templates: tuple[str, ...] = ()
    """Chat templates that word what it was trained on, beside the tokenizer's own."""
    gates_every: int = 1
    """Tokens of an answer that gates are decided for at once."""

    @cached_property
    def ends(self) -> Ends:
        """Where its answers end."""
        return ends_of(self.tokenizer, self.plain.generation_config, self.templates)

    @cached_property
    def tokeniser(self) -> Tokeniser:
        return Tokeniser(self.tokenizer)

    def check_ids(self, ids: Tensor) -> None:
        """Refuse tokens that the model has no embedding of. Raises InputRefused."""
        if ids.numel():
            self.check_most(int(ids.max()))

    def check_most(self, number: int) -> None:
        """Refuse a token that the model has no embedding of. Raises InputRefused."""
        there = self.plain.get_input_embeddings().num_embeddings
        if number >= there:
            raise InputRefused(
                f"the text has token {number}, the model's embedding {there} rows; its tokenizer is that of another "
                "model"
            )

    def texts_of(self, tokens: list[list[int]]) -> list[str]:
        """Return what was written, up to where each answer ends."""
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [self.ends.cut(text) for text in texts]

    @property
    def is_adapted(self) -> bool:
        return isinstance(self.model, PeftModel)

    @property
    def plain(self) -> Any:
        """The transformers model, adapters inside."""
        if self.is_adapted:
            return self.model.base_model.model
        return self.model

    @property
    def may_fork(self) -> bool:
        """Whether one cached prompt can be continued in several ways: no router keeps something for each row."""
        if self.gates_every > 1:
            return False
        if isinstance(self.model, MixtureForCausalLM):
            return not (self.model.keeps_means or self.model.first_pass != "nothing")
        if not self.is_adapted:
            return True
        configs = [config for config in self.model.peft_config.values() if isinstance(config, MixtureConfig)]
        gates = [gate for config in configs for gate in config.routers.values()]
        return not any(gate.is_averaged or gate.input == "hidden" for gate in gates)

    def keeping_gates(self, every: int) -> "Subject":
        """Return the same with gates that are decided once for so many tokens of an answer.

        Raises InputRefused where no gate changes from token to token, or one is not decided linear by linear.
        """
        if not 1 <= every:
            raise InputRefused(f"--gates-every: {every} will not do: a whole number, at least 1")
        if every == 1:
            return self
        found = [each for each in self.model.peft_config.values()] if self.is_adapted else []
        configs = [config for config in found if isinstance(config, MixtureConfig)]
        if not any(config.routers.depends_on == TOKEN for config in configs):
            raise InputRefused("--gates-every: no gate of this model changes from token to token; leave it out")
        if any(config.row.placement != "linear" for config in configs) or forgoes_cache(self.model):
            raise InputRefused("--gates-every: this adapter decides for whole blocks, or by a first pass; leave it out")
        return replace(self, gates_every=every)

    @property
    def reads_spans(self) -> bool:
        """Whether a router of the run needs the marks of spans."""
        return self.run is not None and self.run.routers.reads_spans

    def route(self, batch: Mapping[str, Tensor], copies: int = 1) -> None:
        """Tell the routers what a batch says of its rows, each of which runs `copies` times one after another.

        Raises InputRefused where they read spans and nothing marks any.
        """
        if self.reads_spans and "marks" not in batch:
            raise InputRefused(SPANS_ARE_MISSING)
        if isinstance(self.model, MixtureForCausalLM):
            self.model.text.read_labels(batch.get("labels"), batch.get("attention_mask"))
        if not self.is_adapted:
            return
        if copies > 1:
            of_rows = ("task_index", "group", "external", "marks", "answer_mark")
            batch = {name: batch[name].repeat_interleave(copies, 0) for name in of_rows if name in batch}
        read_rows(self.model, batch)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Be the base while the block runs."""
        assert self.is_adapted
        with adapter_off(self.model):
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Have adapters take the shorter way from token to token while the block runs; none may change in it."""
        with shortcuts(self.model, self.gates_every) if self.is_adapted else nullcontext():
            yield

    def continue_texts(self, ids: Tensor, mask: Tensor, max_new_tokens: int, beams: int = 1) -> list[list[int]]:
        """Continue left-padded prompts (rows, length), greedily or with a beam search; return each row's new tokens.

        The token that ends an answer is left out, a sign that is text is not. `route` comes before, with
        `copies=beams`. Raises NotFinite.
        """
        settings = GenerationConfig(
            do_sample=False,
            num_beams=beams,
            max_new_tokens=max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=list(self.ends.ids),
            use_cache=not (self.is_adapted and forgoes_cache(self.model)),
        )
        with torch.no_grad(), self.writing():
            out = self.plain.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                stopping_criteria=self.ends.criteria(self.tokenizer, ids.shape[1]),
                logits_processor=[RefuseNotFinite()],
            )
        return [self.ends.before(row) for row in out[:, ids.shape[1] :].tolist()]


def open_subject(path: str | Path, allow_changed: Collection[str] = (), base_of: BaseOf = load_base) -> Subject:
    """Open a run or a model folder for asking; `base_of` as `open_run` takes it. Raises InputRefused, DamagedFile."""
    if is_run(path):
        opened = open_run(path, allow_changed=allow_changed, base_of=base_of)
        return Subject(opened.model, opened.tokenizer, opened, named_templates(opened.recipe.data))
    if is_gguf(str(path)):
        return Subject(load_base(Base(model=str(path), quantization="none")), load_tokenizer(str(path)))
    if not Path(path).is_dir():
        raise InputRefused(f"'{path}': no such folder; name a run, a model folder or a GGUF file")
    folder = Path(path)
    verify_where_ours(folder)
    if is_routed_export(folder):
        return Subject(_routed_export(folder), load_tokenizer(str(path)))
    if (folder / "adapter_config.json").is_file():
        return _lora_export(folder, base_of)
    if any(folder.glob("*.gguf")):
        raise InputRefused(
            f"'{path}' holds a GGUF file, which llama.cpp runs; name the file itself to ask its numbers here"
        )
    if not (folder / "config.json").is_file():
        raise InputRefused(f"'{path}' is neither a run nor a model's folder: no recipe.yaml, no config.json")
    base = Base(model=str(path), quantization="none")
    return Subject(load_base(base), load_tokenizer(base.model))


def model_mark(path: str | Path) -> str:
    """Return a hash that two runs or model folders share only if they answer alike."""
    if is_run(path):
        # An adapter's manifest holds the hashes of its files and of its base: its own hash stands for all.
        return hash_of_file(RunFolder(Path(path)).adapter / MANIFEST)
    if (Path(path) / "adapter_config.json").is_file():
        base = _lora_base(Path(path))
        files = [Path(path) / "adapter_config.json", *sorted(Path(path).glob("*.safetensors"))]
        parts = [base.model_dump_json(), fingerprint(base), *hashes_of_files(files)]
        return hash_of_bytes("\n".join(parts).encode())
    return fingerprint(Base(model=str(path), quantization="none"))


def is_routed_export(folder: Path) -> bool:
    """Tell whether a folder holds an export of the routed model itself."""
    return _routed_family(folder) is not None


def _routed_family(folder: Path) -> str | None:
    """Return the family of an exported routed model; None where a folder holds none that runs here."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    kind = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(kind, str) or not kind.endswith(SUFFIX) or kind.removesuffix(SUFFIX) not in CONFIGS:
        return None
    return kind.removesuffix(SUFFIX)


def _routed_export(folder: Path) -> Any:
    """Load an export of the routed model by this package's own code; the folder's copy of it is not run."""
    device = default_device()
    dtype = compute_dtype(Base(model=str(folder), quantization="none"), device)
    family = _routed_family(folder)
    assert family is not None
    check_config(folder, code=auto_map(family))
    for path in check_weights(folder):
        check_finite(path)
    config_class, model_class = classes_of(family)
    try:
        config = config_class.from_pretrained(folder)
        model = model_class.from_pretrained(
            folder, config=config, dtype=dtype, device_map={"": device}, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise InputRefused(f"'{folder}' cannot be loaded: {str(error).splitlines()[0]}") from error
    if model.generation_config is not None:
        model.generation_config = ends_alone(model.generation_config)
    return model.eval()


def _lora_export(folder: Path, base_of: BaseOf) -> Subject:
    """Put a LoRA on its base, in the quantisation that its manifest tells, else in none."""
    base = _lora_base(folder)
    model = load_foreign_adapter(base_of(base, None), folder)
    where = str(folder) if (folder / "tokenizer_config.json").is_file() else base.model
    return Subject(model.eval(), load_tokenizer(where))


def _lora_base(folder: Path) -> Base:
    """Return the base that a LoRA belongs to. Raises InputRefused."""
    check_adapter(folder)
    content = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    settings = (read_manifest(folder) or {}).get("base")
    try:
        return Base(**(settings or {"model": str(content.get(_BASE)), "quantization": "none"}))
    except (ValidationError, TypeError) as error:
        raise InputRefused(
            f"'{folder}' names no base that can be loaded: {settings or content.get(_BASE)!r}"
        ) from error


__all__ = ["Subject", "model_mark", "open_subject"]
