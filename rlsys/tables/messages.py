"""Conversations in the cells of a data file: lists of messages, as chat data sets have them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

from rlsys.errors import DataError
from rlsys.tables.files import described, is_unicode
from rlsys.tables.templates import QUESTION, filled
from rlsys.types import Message, Question

Conversation = tuple[Message, ...]

_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
# The names that ShareGPT gives to the roles.
_ROLES = {"human": "user", "gpt": "assistant"}
# Roles with which ShareGPT rows hold calls of tools.
_CALLS = ("function_call", "tool_call")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_LIST_OF_OBJECTS = re.compile(r"\s*\[\s*\{")
_PYTHON_MESSAGES = re.compile(r"\s*\[\s*\{\s*'(role|from|content|value)'\s*:")
# Keys of a message that templates render besides its content.
_RENDERED = ("tool_calls", "reasoning_content", "thinking")


def unfolded(cell: Any) -> Any:
    """Return the messages of a cell that holds them as JSON text; any other cell is unchanged.

    CSV files have no other way to hold them.

    Raises:
        DataError: The cell holds messages as Python prints them.
    """
    if not isinstance(cell, str) or not _LIST_OF_OBJECTS.match(cell):
        return cell
    try:
        messages = json.loads(cell)
    except (ValueError, RecursionError):
        if _PYTHON_MESSAGES.match(cell):
            reason = "expected messages as JSON, found the text of a Python list; write them with json.dumps"
            raise DataError(reason) from None
        return cell
    return messages if is_conversation(messages) else cell


def refuse_media(values: Mapping[str, Any]) -> None:
    """Raise DataError if a row has images, videos or sound, which the policy would not get."""
    for name in _MEDIA:
        if isinstance(values.get(name), list | Mapping) and values[name]:
            raise DataError(f"column {name}: expected none, found {name}, which is not read")


def is_conversation(value: Any) -> TypeGuard[list[Mapping[str, Any]]]:
    """Return whether a cell is a list of messages."""
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and any(key in value for key in _ROLE_KEYS)


def conversation(value: Sequence[Mapping[str, Any]]) -> Conversation:
    """Return the messages of a cell for which `is_conversation` holds.

    Raises:
        DataError: A message has no role, its content is not text, or it has calls of tools or hidden reasoning.
    """
    return tuple(_message(number, message) for number, message in enumerate(value, 1))


def _message(number: int, message: Mapping[str, Any]) -> Message:
    for key in _RENDERED:
        if message.get(key):
            raise DataError(f"message {number}: expected role and content, found {key}, which is not read")
    role = next((message[key] for key in _ROLE_KEYS if message.get(key)), None)
    content = _plain_content(next((message[key] for key in _CONTENT_KEYS if message.get(key) is not None), None))
    if not isinstance(role, str):
        raise DataError(f"message {number}: expected a role, found {role!r}")
    if role in _CALLS:
        raise DataError(f"message {number}: expected role and content, found {role}, which is not read")
    if content is None:
        raise DataError(f"message {number}: expected text as content, found {str(message)[:60]!r}")
    if not is_unicode(content):
        raise DataError(f"message {number}: expected text as content, found {described(content)}")
    return Message(role=_ROLES.get(role, role), content=content)


def _plain_content(content: Any) -> str | None:
    """Return the text of a content. Some data sets write it as a list of parts of the type text."""
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        parts = [part.get("text") for part in content]
        return "".join(parts) if all(isinstance(part, str) for part in parts) else None
    return content if isinstance(content, str) else None


def before_reply(messages: Conversation) -> Conversation:
    """Return the messages before the last turn of the assistant, or all if the conversation ends with another turn.

    Raises:
        DataError: Nothing is left to reply to.
    """
    prompt = messages[:-1] if messages[-1].role == "assistant" else messages
    check_prompt(prompt)
    return prompt


def split_reply(messages: Conversation) -> tuple[Conversation, Conversation]:
    """Split a conversation before its last turn of the assistant. Messages after that turn are left out.

    Raises:
        DataError: There is no such turn, or nothing before it.
    """
    last = max((number for number, message in enumerate(messages) if message.role == "assistant"), default=None)
    if last is None:
        raise DataError("expected a message of the assistant, found none")
    check_prompt(messages[:last])
    check_reply(messages[last : last + 1])
    return messages[:last], messages[last : last + 1]


def check_prompt(messages: Conversation) -> None:
    """Raise DataError unless a conversation has a text and ends with a turn that the assistant can reply to."""
    if not any(message.content.strip() for message in messages):
        raise DataError("expected a message to reply to, found none")
    if messages[-1].role in ("assistant", "system"):
        raise DataError(f"expected a last message of the user or a tool, found one of the {messages[-1].role}")


def check_reply(messages: Conversation) -> None:
    """Raise DataError unless a reply begins and ends with a turn of the assistant that has a text."""
    if not messages:
        raise DataError("expected text of the assistant, found none")
    for message in (messages[0], messages[-1]):
        if message.role != "assistant":
            raise DataError(f"expected text of the assistant, found a message of the {message.role}")
        if not message.content.strip():
            raise DataError("expected text of the assistant, found a blank message")


def with_template(question: Question, template: str, columns: Mapping[str, str] | None = None) -> Question:
    """Put a question, or the last message of the user in a conversation, into a template with {question}.

    Args:
        question: the question.
        template: see `rlsys.tables.templates`.
        columns: texts of its other fields, by name.
    """
    if isinstance(question, str):
        return filled(template, {**(columns or {}), QUESTION: question})
    last = max((number for number, message in enumerate(question) if message.role == "user"), default=None)
    if last is None:
        return question
    content = filled(template, {**(columns or {}), QUESTION: question[last].content})
    return (*question[:last], replace(question[last], content=content), *question[last + 1 :])


def with_system_prompt(question: Question, system_prompt: str | None) -> Question:
    """Put a system message before a question, unless it is a conversation that has one. None changes nothing."""
    if system_prompt is None:
        return question
    messages = (Message(role="user", content=question),) if isinstance(question, str) else question
    if any(message.role == "system" for message in messages):
        return question
    return (Message(role="system", content=system_prompt), *messages)


def question_texts(question: Question) -> tuple[str, ...]:
    """Return all texts of a question, for its characters."""
    return (question,) if isinstance(question, str) else tuple(message.content for message in question)
