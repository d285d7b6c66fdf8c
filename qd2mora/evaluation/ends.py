"""Where an answer ends: the tokenizer's end token, generation_config's list, what a chat template closes with.

Bases name several ends (Llama 3, Gemma 3, Qwen): a tokenizer's own is often the one that closes a text, not a turn. The
sign with which a template closes a turn is a token where the tokenizer has it as one, else it is looked for as text.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria

from qd2mora.data.chat import closing_sign
from qd2mora.data.chat_template import ChatTemplate
from qd2mora.data.tokenise import special_tokens
from qd2mora.errors import InputRefused

HALF_LETTER = "�"
"""What a text ends with while the rest of its last letter is still to come."""
_LOOKED_AT = 32  # tokens at the end of a text in which a sign is looked for
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ends:
    """`ids`: tokens that end an answer; `signs`: texts that do, where a template closes turns with no token."""

    ids: tuple[int, ...]
    signs: tuple[str, ...] = ()

    def before(self, tokens: list[int]) -> list[int]:
        """Return the tokens before the first that ends the answer."""
        places = [place for place, token in enumerate(tokens) if token in self.ids]
        return tokens[: places[0]] if places else tokens

    def cut(self, text: str) -> str:
        """Return the text before the first sign that ends the answer."""
        return min((text.split(sign)[0] for sign in self.signs), key=len, default=text)

    def settled(self, text: str) -> str:
        """Return of a text that goes on what no later token can make part of a sign."""
        text = self.cut(text)
        begun = (size for sign in self.signs for size in range(1, len(sign)) if text.endswith(sign[:size]))
        return text[: len(text) - max(begun, default=0)]

    def criteria(self, tokenizer: PreTrainedTokenizerBase, start: int) -> list[StoppingCriteria]:
        """Return what tells transformers' generation that a sign was written after the `start` tokens given."""
        return [_SignWritten(tokenizer, self.signs, start)] if self.signs else []


class _SignWritten(StoppingCriteria):
    def __init__(self, tokenizer: Any, signs: Sequence[str], start: int) -> None:
        self.tokenizer, self.signs, self.start = tokenizer, signs, start

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        last = input_ids[:, self.start :][:, -_LOOKED_AT:]
        texts: list[str] = self.tokenizer.batch_decode(last, skip_special_tokens=True)
        found = [any(sign in text for sign in self.signs) for text in texts]
        return torch.tensor(found, device=input_ids.device)


def ends_of(
    tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None, templates: Collection[str] = ()
) -> Ends:
    """Return the ends of a model's answers; `templates`: those that words what it is asked, beside its own."""
    ids = {int(tokenizer.eos_token_id)}
    listed = None if generation is None else generation.eos_token_id
    if listed is not None:
        ids |= {int(each) for each in (listed if isinstance(listed, list) else [listed])}
    signs = set()
    own = [tokenizer.chat_template] if isinstance(tokenizer.chat_template, str) else []
    for template in dict.fromkeys([*own, *templates]):
        sign = _sign_of(template, tokenizer)
        first = tokenizer(sign, add_special_tokens=False)["input_ids"][:1] if sign else []
        # Its first token is enough where that is one of its own: white space that a template writes behind it may be
        # missing.
        if first and first[0] in tokenizer.added_tokens_decoder:
            ids.add(int(first[0]))
        elif sign:
            signs.add(sign)
    return Ends(tuple(sorted(ids)), tuple(sorted(signs)))


def _sign_of(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        with ChatTemplate(template, special_tokens(tokenizer), "the tokenizer") as opened:
            return closing_sign(opened)
    except InputRefused as error:
        _log.warning("%s; how it closes a turn is not known, answers end at the model's own end tokens", error)
        return ""


__all__ = ["HALF_LETTER", "Ends", "ends_of"]
