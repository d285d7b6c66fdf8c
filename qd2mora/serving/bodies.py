"""What clients may ask, as OpenAI's interface words it; what would change an answer and is not done here is refused.

Fields that change no answer (`user`, `metadata`, `store`) are taken and not used.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qd2mora.errors import InputRefused

MOST_MESSAGES = 1024
MOST_ANSWERS = 8
MOST_STOPS = 4
MOST_TOP = 20
Stop = Annotated[str, Field(min_length=1, max_length=200)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """A part of a message; only text is read."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """What it says."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    """Whether a stream ends with its usage."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Body(_Strict):
    """What both kinds of completion take."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    vector: Annotated[list[float], Field(max_length=65536)] | None = None
    """Ours: where routers read one."""
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    @field_validator("frequency_penalty", "presence_penalty", mode="before")
    @classmethod
    def _zero(cls, value: object) -> object:
        return 0 if isinstance(value, float) and value == 0 else value

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        if isinstance(self.stop, str):
            return (self.stop,)
        return tuple(self.stop or ())


class ChatBody(Body):
    """A body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    @property
    def num_top(self) -> int | None:
        """How many likely tokens are told beside each; None where no log probability is."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most(self) -> int | None:
        """Tokens of an answer."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages, as templates read them. Raises InputRefused where nothing is asked."""
        if self.messages[-1].role != "user":
            raise InputRefused("messages: the last one is not the user's: nothing is asked")
        roles = {"developer": "system"}
        return [{"role": roles.get(each.role, each.role), "content": each.text} for each in self.messages]


class CompletionBody(Body):
    """A body of /v1/completions: texts that are continued as they are."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MOST_ANSWERS)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str]:
        """The texts."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


Kind = TypeVar("Kind", bound=Body)


def read_body(kind: type[Kind], content: bytes) -> Kind:
    """Return a checked body. Raises InputRefused naming the field."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(each) for each in first["loc"] if not str(each).endswith("]"))
        raise InputRefused(f"{where + ': ' if where else ''}{first['msg'][:200]}") from None
    except RecursionError:
        raise InputRefused("the body is nested too deep") from None


__all__ = ["Body", "ChatBody", "CompletionBody", "Kind", "read_body"]
