"""Conversations as the chat template of a tokenizer renders them."""

from __future__ import annotations

from collections.abc import Collection
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


def encode_reply(tokenizer: Any, prompt: tuple[Message, ...], reply: tuple[Message, ...]) -> list[int]:
    """Return the token ids that a chat template renders for a reply, after the prompt that the policy receives.

    A template may render the prompt in another way once the reply is there, or leave a part of the reply out, such as
    its reasoning. The completion is then the content of the reply alone.

    Raises:
        DataError: The template cannot render the conversation, or it renders the prompt in another way before a reply
            of several messages.
    """
    before = rendered(tokenizer, prompt, add_generation_prompt=True)
    whole = rendered(tokenizer, prompt + reply, add_generation_prompt=False)
    completion = whole[len(before) :]
    if whole.startswith(before) and all(_squeezed(each.content) in _squeezed(completion) for each in reply):
        prompt_ids, whole_ids = _encoded(tokenizer, before), _encoded(tokenizer, whole)
        if whole_ids[: len(prompt_ids)] == prompt_ids:
            return whole_ids[len(prompt_ids) :]
        return _encoded(tokenizer, completion)
    if len(reply) == 1:
        return _encoded(tokenizer, reply[0].content)
    raise DataError("expected a reply of one message: the chat template renders the prompt otherwise with the reply")


def template_note(tokenizer: Any, question: str) -> str | None:
    """Return a line about a template after whose prompts a reply probably does not begin, or None.

    A template without a use for `add_generation_prompt` is right if the reply follows the question at once. It is
    probably wrong if other text precedes a reply, such as the header of a turn, because sampled prompts then lack it.
    """
    if tokenizer.chat_template is None:
        return None
    if not tokenizer.chat_template:
        return "the chat template is empty, so questions are plain text; remove the file if this is meant"
    messages, reply = (Message(role="user", content=question),), "Nineteen"
    try:
        prompt = rendered(tokenizer, messages, add_generation_prompt=True)
        if prompt != rendered(tokenizer, messages, add_generation_prompt=False):
            return None
        answered = (*messages, Message(role="assistant", content=reply))
        whole = rendered(tokenizer, answered, add_generation_prompt=False)
    except DataError:
        return None  # some templates render no reply; sampling needs prompts alone
    header = whole.removeprefix(prompt).partition(reply)[0]
    if not whole.startswith(prompt) or reply not in whole or not any(map(str.isalnum, header)):
        return None
    return (
        f"the chat template ends prompts without {header!r}, which it writes before a reply, so the policy has to "
        "write it; the template should write it if add_generation_prompt is true"
    )


def reply_header(tokenizer: Any) -> str:
    """Return the text that a chat template writes between the question of a prompt and its reply; "" without one."""
    question = "Nineteen"
    try:
        prompt = rendered(tokenizer, (Message(role="user", content=question),), add_generation_prompt=True)
    except DataError:
        return ""
    return prompt.rpartition(question)[2].strip() if tokenizer.chat_template and question in prompt else ""


def cut_after_end(tokenizer: Any, token_ids: list[int], end_tokens: Collection[int]) -> list[int]:
    """Leave out the white space that a chat template writes after the end token; the policy stops there."""
    last = max((place for place, token in enumerate(token_ids) if token in end_tokens), default=len(token_ids) - 1)
    return token_ids if tokenizer.decode(token_ids[last + 1 :]).strip() else token_ids[: last + 1]


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def rendered(tokenizer: Any, messages: tuple[Message, ...], *, add_generation_prompt: bool) -> str:
    """Return the text of a conversation.

    Raises:
        DataError: The template cannot render it.
    """
    if not tokenizer.chat_template:
        plain_text(messages)
    try:
        text: str = tokenizer.apply_chat_template(
            chat_messages(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # A template is a program and can raise anything; the row is then unreadable.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"the chat template cannot render the conversation: {reason}") from error
    return text


def _squeezed(text: str) -> str:
    return "".join(text.split())
