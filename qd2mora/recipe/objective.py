"""The recipe's objective: what is learned of the rows, and the settings that it has."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from qd2mora.recipe.section import NotNegative, Positive, Section, Size

Kind = Literal["sft", "dpo", "orpo", "simpo", "kto", "peam", "reward", "grpo"]
HEAD_WIDTH = 16
"""Units of the network over experts' scores."""
PREFERENCE, RATED = "preference", "rated"
"""Formats of rows whose answers are judged."""


@dataclass(frozen=True)
class Needs:
    """What a kind of objective asks of the rest of a recipe.

    `settings`: its keys with their defaults. `format`: of rows that it alone learns from, None: it learns answers.
    `lines`: texts of a row that run through the model together. `has_logits`: its loss is of next tokens; False: of a
    score, which a head makes of one state of each text.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    format: str | None = None
    lines: int = 1
    has_logits: bool = True


KINDS: dict[str, Needs] = {
    "sft": Needs(),
    "dpo": Needs(
        {"beta": 0.1, "loss": "sigmoid", "label_smoothing": 0.0, "reference": "kept"}, format=PREFERENCE, lines=2
    ),
    "orpo": Needs({"beta": 0.1}, format=PREFERENCE, lines=2),
    "simpo": Needs({"beta": 2.0, "gamma": 1.0}, format=PREFERENCE, lines=2),
    "kto": Needs({"beta": 0.1, "good_weight": 1.0, "bad_weight": 1.0, "reference": "kept"}, format=RATED),
    "peam": Needs(
        {"beta": 0.1, "contrast": 1.0, "consolidate": "all", "reference": "kept"}, format=PREFERENCE, lines=2
    ),
    "reward": Needs({"head": "linear"}, format=PREFERENCE, lines=2, has_logits=False),
    "grpo": Needs(
        {
            "rule": "exact",
            "pattern": None,
            "words": None,
            "samples": 8,
            "temperature": 1.0,
            "max_new_tokens": 64,
            "kl": 0.0,
        }
    ),
}
NOT_OF_THE_LOSS = ("reference", "consolidate", "head", *(name for name in KINDS["grpo"].settings if name != "kl"))
"""Settings that say what rows are learned, and not what is made of them."""


class Objective(Section):
    """What is learned; a name alone stands for a section with its defaults. docs/objectives.md has the equations."""

    kind: Kind = "sft"
    """`sft`: the answers. Of `format: preference`: `dpo`, `orpo`, `simpo`, `peam`, and `reward`, a model that scores
    answers. Of `format: rated`: `kto`. `grpo`: answers that the run writes itself, by the rewards of a rule."""
    beta: Positive | None = None
    """How much a preference counts: of `dpo`, `peam` and `kto` the factor on log p/reference (0.1), of `orpo` the
    weight beside imitation (0.1), of `simpo` the factor on log p a token (2.0)."""
    loss: Literal["sigmoid", "hinge", "ipo"] | None = None
    """Of `dpo`: `sigmoid`, the paper's (where left out); `hinge`, SLiC's; `ipo`, a square."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    """Of `dpo` with `loss: sigmoid`: the share of preferences that may be the wrong way round (0)."""
    gamma: NotNegative | None = None
    """Of `simpo`: the margin that rewards are to reach (1.0)."""
    good_weight: Positive | None = None
    """Of `kto`: what a good answer counts (1.0)."""
    bad_weight: Positive | None = None
    """Of `kto`: what a bad answer counts (1.0)."""
    contrast: NotNegative | None = None
    """Of `peam`: what setting a correction apart from its failure counts beside imitating it (1.0)."""
    consolidate: Literal["all", "due"] | None = None
    """Of `peam`: the tasks that are learned, `all`, or those that are `due`: whose failures the reference repeats, by
    more than pairs differ among themselves. Rows of others are passed over, and their experts keep their bits."""
    reference: Literal["kept", "live"] | None = None
    """Of `dpo`, `peam` and `kto`: what the reference says of the rows is computed once and `kept` on disk (where left
    out), or `live` in every step. The reference is the base alone, or the adapter that `adapter.start` names, as it
    was."""
    head: Literal["linear", "experts"] | None = None
    """Of `reward`: a `linear` of the last state (where left out), or a small network over what all `experts` of
    `adapter.start` score, a reward run with an expert for each of its tasks; it alone is trained."""

    rule: Literal["exact", "regex", "length", "file"] | None = None
    """Of `grpo`, what an answer is worth: 1 where its words are the right ones (`exact`, where left out) or it has a
    match of `pattern` (`regex`); less the further it is from `words` words (`length`); or what the Python file says
    that `train --reward-file` names (`file`)."""
    pattern: str | None = None
    """Of `rule: regex`."""
    words: Size | None = None
    """Of `rule: length`."""
    samples: Annotated[int, Field(ge=2, le=1024)] | None = None
    """Of `grpo`: answers that are drawn to each prompt and compared with one another (8)."""
    temperature: Positive | None = None
    """Of `grpo`: at which they are drawn (1.0)."""
    max_new_tokens: Size | None = None
    """Of `grpo`: tokens of an answer at most (64); prompt and answer together stay within `data.max_length`."""
    kl: NotNegative | None = None
    """Of `grpo`: how much each token's distance from the reference counts beside the rewards (0: not at all)."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"'{pattern}' is no regular expression: {error}") from error
        return pattern

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: object) -> object:
        """Take a name for a section, and fill in what the kind takes where it is left out."""
        if isinstance(given, str):
            given = {"kind": given}
        if not isinstance(given, dict) or given.get("kind", "sft") not in KINDS:
            return given  # the fields say what is wrong
        kind = given.get("kind", "sft")
        settings = KINDS[kind].settings
        told = {name: value for name, value in given.items() if value is not None}
        foreign = [name for name in told if name in cls.model_fields and name not in ("kind", *settings)]
        if foreign:
            raise ValueError(f"{foreign[0]} is no setting of {kind}; it has {', '.join(settings) or 'none'}")
        return settings | told

    @model_validator(mode="after")
    def _agrees(self) -> "Objective":
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is of loss: sigmoid, and has no meaning in {self.loss}; 0")
        if self.consolidate == "due" and self.reference != "kept":
            raise ValueError(f"consolidate: due asks before the first step; reference: kept, not {self.reference}")
        for name, rule in (("pattern", "regex"), ("words", "length")):
            if self.kind == "grpo" and (getattr(self, name) is not None) != (self.rule == rule):
                raise ValueError(f"{name} goes with rule: {rule}, and rule: {rule} with {name}; rule is {self.rule}")
        return self

    @property
    def needs(self) -> Needs:
        """What it asks of the rest of a recipe."""
        return KINDS[self.kind]

    @property
    def is_sft(self) -> bool:
        """Whether answers are learned, as runs from before there were others do."""
        return self.kind == "sft"

    @property
    def of_the_loss(self) -> dict[str, Any]:
        """The settings that the loss is made of."""
        return {name: getattr(self, name) for name in self.needs.settings if name not in NOT_OF_THE_LOSS}


__all__ = ["HEAD_WIDTH", "KINDS", "PREFERENCE", "RATED", "Needs", "Objective"]
