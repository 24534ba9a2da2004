"""Turn questions and demonstrations into token ids, and find the tokens that end a completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlsys.errors import ConfigError, DataError
from rlsys.models.conversations import chat_messages, plain_text
from rlsys.types import Question


def encode_prompt(tokenizer: Any, question: Question) -> list[int]:
    """Return the token ids of a question as one user turn, or of a conversation, ready for the answer.

    Without a chat template the question is encoded as plain text.

    Raises:
        ConfigError: The chat template cannot render one user turn.
        DataError: It cannot render the conversation.
    """
    if not tokenizer.chat_template:
        return list(tokenizer(plain_text(question))["input_ids"])
    messages = chat_messages(question)
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    except Exception as error:
        # A template is a program of the model folder. Whatever it raises for one user turn is a fault of that folder.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if not isinstance(question, str):
            raise DataError(f"the chat template cannot render the conversation: {reason}") from error
        raise ConfigError(
            f"{tokenizer.name_or_path}: expected a chat template that renders one user message, found {reason}; "
            "mend the chat template of this folder (chat_template.jinja or tokenizer_config.json)"
        ) from error


def encode_demonstration(tokenizer: Any, question: Question, chain: str) -> tuple[list[int], int]:
    """Return the token ids of prompt, chain and end token, and the number of prompt tokens."""
    prompt = encode_prompt(tokenizer, question)
    completion = tokenizer(chain, add_special_tokens=False)["input_ids"]
    return [*prompt, *completion, end_token_id(tokenizer)], len(prompt)


def end_token_id(tokenizer: Any) -> int:
    """Return the tokenizer's end-of-sequence token."""
    return int(tokenizer.eos_token_id)


def end_token_ids(tokenizer: Any, folder: Path) -> list[int]:
    """Return all tokens that end a completion, the tokenizer's own first.

    Chat models name the end of a turn in the tokenizer or in the generation config of the model folder.
    """
    path = folder / "generation_config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    tokens = named if isinstance(named, list) else [named]
    return list(dict.fromkeys([end_token_id(tokenizer), *(int(token) for token in tokens if token is not None)]))
