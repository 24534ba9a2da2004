"""Turn questions and demonstrations into token ids, and find the tokens that end a completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def encode_prompt(tokenizer: Any, question: str) -> list[int]:
    """Return the token ids of a question as one user turn, ready for the answer.

    Without a chat template the question is encoded as plain text.
    """
    if not tokenizer.chat_template:
        return list(tokenizer(question)["input_ids"])
    messages = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def encode_demonstration(tokenizer: Any, question: str, chain: str) -> tuple[list[int], int]:
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
