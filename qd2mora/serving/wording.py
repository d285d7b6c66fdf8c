"""Answers as OpenAI's interface words them: whole, in chunks, with usage and log probabilities."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qd2mora.serving.engine import Token

FINISHES = {"stop": "stop", "length": "length", "timeout": "length"}


@dataclass
class Said:
    """What was said of one answer so far."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None
    num_tokens: int = 0


@dataclass(frozen=True)
class Reply:
    """One request's way of being answered. `num_top`: None where no log probabilities are wanted."""

    model: str
    is_chat: bool
    num_prompt_tokens: int
    num_top: int | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Said]) -> dict[str, Any]:
        """Return the one answer to a request that is no stream."""
        choices = [self._choice(number, said) for number, said in enumerate(answers)]
        return self._head("") | {"choices": choices, "usage": self.usage(answers)}

    def usage(self, answers: Sequence[Said]) -> dict[str, int]:
        """Return how many tokens were read and written."""
        written = sum(said.num_tokens for said in answers)
        read = self.num_prompt_tokens
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def chunk(self, number: int, said: Said, *, is_first: bool = False) -> dict[str, Any]:
        """Return news of one answer, as a stream's event holds it."""
        choice = self._choice(number, said)
        if self.is_chat:
            delta = {"role": "assistant"} if is_first else {}
            choice["delta"] = delta | ({"content": said.text} if said.text or is_first else {})
            del choice["message"]
        return self._head(".chunk") | {"choices": [choice]}

    def last_chunk(self, answers: Sequence[Said]) -> dict[str, Any]:
        """Return the event that tells the usage of a stream."""
        return self._head(".chunk") | {"choices": [], "usage": self.usage(answers)}

    def _head(self, kind: str) -> dict[str, Any]:
        name = f"chat.completion{kind}" if self.is_chat else "text_completion"
        begins = "chatcmpl" if self.is_chat else "cmpl"
        return {"id": f"{begins}-{self.id}", "object": name, "created": self.created, "model": self.model}

    def _choice(self, number: int, said: Said) -> dict[str, Any]:
        finish = None if said.finish is None else FINISHES.get(said.finish, said.finish)
        choice: dict[str, Any] = {"index": number, "finish_reason": finish, "logprobs": self._logprobs(said.tokens)}
        if self.is_chat:
            return choice | {"message": {"role": "assistant", "content": said.text, "refusal": None}}
        return choice | {"text": said.text}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.num_top is None:
            return None
        if self.is_chat:
            content = []
            for token in tokens:
                top = [_of_token(text, logprob) for text, logprob in token.top]
                content.append(_of_token(token.text, token.logprob) | {"top_logprobs": top})
            return {"content": content, "refusal": None}
        offsets, place = [], 0
        for token in tokens:
            offsets.append(place)
            place += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [dict(token.top) for token in tokens],
            "text_offset": offsets,
        }


def _of_token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}


def event(content: dict[str, Any] | str) -> bytes:
    """Return an event of a stream."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return f"data: {text}\n\n".encode("utf-8", "replace")


def problem(words: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """Return an error as clients read it."""
    return {"error": {"message": words, "type": kind, "param": None, "code": None}}


__all__ = ["Reply", "Said", "event", "problem"]
