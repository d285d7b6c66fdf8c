"""From what somebody says to the tokens a model goes on from, and to where its answers end: for one task of a subject.

One conversation, a server's many and a file of prompts are all worded here.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Self

from qd2mora.data.chat_template import ChatTemplate
from qd2mora.data.file_rows import BadRow
from qd2mora.data.instruction import split
from qd2mora.data.tokenise import special_tokens
from qd2mora.errors import InputRefused
from qd2mora.evaluation.ends import Ends
from qd2mora.evaluation.subject import Subject
from qd2mora.evaluation.wording import wording_of
from qd2mora.recipe.data import AS_IT_IS

Messages = Sequence[Mapping[str, str]]


class Prompting:
    """Words messages as a task was trained, or by the template asked for; `with` it, and its template's child ends.

    `line` says how. Where no chat template words a conversation its last message is asked alone, as in training.
    """

    def __init__(
        self, subject: Subject, template: str | None = None, task: str | None = None, *, is_conversation: bool = True
    ) -> None:
        """Raises InputRefused where there is no such template."""
        wording = wording_of(subject, template, task, is_conversation=is_conversation)
        self.line, self._name, self._text = wording.line, wording.name, wording.template
        if self._text is not None and self._text not in subject.templates:  # its sign ends an answer too
            subject = replace(subject, templates=(*subject.templates, self._text))
        self.subject = subject
        self._template: ChatTemplate | None = None
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._begin()
        return self

    def _begin(self) -> None:
        if self._text is not None:
            template = ChatTemplate(self._text, special_tokens(self.subject.tokenizer), "the chat template")
            self._template = self._open.enter_context(template)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    @property
    def ends(self) -> Ends:
        """Where answers end."""
        return self.subject.ends

    def of_messages(self, messages: Messages) -> list[int]:
        """Return the tokens of a conversation that asks. Raises InputRefused."""
        text, is_rendered = self.worded(messages)
        return self.of_text(text, is_rendered=is_rendered)

    def worded(self, messages: Messages) -> tuple[str, bool]:
        """Return the text of a conversation that asks, and whether it brings its own start token.

        Raises InputRefused.
        """
        if self._template is not None:
            try:
                return self._template.render([dict(each) for each in messages], asking=True), True
            except BadRow as error:
                raise InputRefused(f"{self._template.where}: {error}") from error
            except InputRefused:
                # Its child has ended with this conversation; the next one gets another.
                self._open.close()
                self._begin()
                raise
        if any(each["role"] == "system" for each in messages):
            raise InputRefused("a system message has no place in the wording this model was trained with; leave it out")
        asked = messages[-1]["content"]
        if self._name == AS_IT_IS:
            return asked, False
        return split({"instruction": asked, "output": ""})[0], False

    def of_text(self, text: str, *, is_rendered: bool = False) -> list[int]:
        """Return the tokens of a text that is continued; see `tokens_of_text`. Raises InputRefused."""
        return tokens_of_text(self.subject, text, is_rendered=is_rendered)


def tokens_of_text(subject: Subject, text: str, *, is_rendered: bool = False) -> list[int]:
    """Return the tokens of a text that is continued; a rendered one brings its own start token.

    Raises InputRefused where there are none, or no room for an answer.
    """
    ids: list[int] = subject.tokenizer(text, add_special_tokens=not is_rendered)["input_ids"]
    whole = int(subject.plain.config.max_position_embeddings)
    if not ids:
        raise InputRefused("the prompt is empty: there is no token to go on from")
    if len(ids) >= whole:
        raise InputRefused(f"the prompt has {len(ids)} tokens, the model is made for {whole} with the answer")
    subject.check_most(max(ids))
    return ids


__all__ = ["Messages", "Prompting", "tokens_of_text"]
