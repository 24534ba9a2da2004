"""Conversations as the chat template of a tokenizer renders them."""

from __future__ import annotations

from typing import Any

from rlsys.errors import DataError
from rlsys.types import Message, Question


def chat_messages(question: Question) -> list[dict[str, str]]:
    """Return a question as the list of messages that a chat template takes."""
    messages = (Message(role="user", content=question),) if isinstance(question, str) else question
    return [{"role": message.role, "content": message.content} for message in messages]


def plain_text(question: Question) -> str:
    """Return the text of a question that needs no chat template.

    Raises:
        DataError: The question is a conversation.
    """
    if isinstance(question, str):
        return question
    raise DataError("expected a chat template in the tokenizer, because the question is a conversation, found none")


def completion_text(tokenizer: Any, prompt: tuple[Message, ...], reply: tuple[Message, ...]) -> str:
    """Return the text that a chat template renders for a reply, after the prompt that the policy receives.

    A template may render the prompt in another way once the reply is there, or leave a part of the reply out, such as
    its reasoning. The completion is then the content of the reply alone.

    Raises:
        DataError: The template cannot render the conversation, or only with another prompt before several messages.
    """
    before = _rendered(tokenizer, prompt, add_generation_prompt=True)
    whole = _rendered(tokenizer, prompt + reply, add_generation_prompt=False)
    completion = whole[len(before) :]
    if whole.startswith(before) and all(_squeezed(each.content) in _squeezed(completion) for each in reply):
        return completion
    if len(reply) == 1:
        return reply[0].content
    raise DataError("expected a reply of one message: the chat template renders the prompt otherwise with the reply")


def _rendered(tokenizer: Any, messages: tuple[Message, ...], *, add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        plain_text(messages)
    try:
        text: str = tokenizer.apply_chat_template(
            chat_messages(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # A template is a program and can raise anything; the row is then unreadable.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"the chat template cannot render the conversation: {reason}") from None
    return text


def _squeezed(text: str) -> str:
    return "".join(text.split())
