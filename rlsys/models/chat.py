"""Turn questions and demonstrations into token ids, and find the tokens that end a completion."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlsys.errors import ConfigError, DataError
from rlsys.models.chat_template import chat_messages, plain_text
from rlsys.models.turns import TurnEncoder
from rlsys.types import Chain, Question


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


def encode_demonstration(
    tokenizer: Any, question: Question, chain: Chain, turns: TurnEncoder | None = None
) -> tuple[list[int], list[bool]]:
    """Return the token ids of prompt, chain and end token, and which of them the policy writes.

    Args:
        turns: encoder of the texts of an environment; by default, they stand in the chain as they are.
    """
    prompt = encode_prompt(tokenizer, question)
    pieces = (chain,) if isinstance(chain, str) else chain
    token_ids, own = (turns or TurnEncoder(tokenizer, None)).chain(pieces, end_token_id(tokenizer))
    return [*prompt, *token_ids], [False] * len(prompt) + own


class CheckedEncoder:
    """Encoder of the prompts and demonstrations of one model, which refuses what the model cannot read.

    Args:
        tokenizer: the tokenizer of the model.
        vocabulary: number of token ids that the model has; None if it is not known.
        turns: encoder of the texts of an environment in demonstrations; None without an environment.
    """

    def __init__(self, tokenizer: Any, vocabulary: int | None, turns: TurnEncoder | None = None) -> None:
        self._tokenizer = tokenizer
        self._turns = turns
        self._vocabulary = vocabulary

    def prompt(self, question: Question) -> list[int]:
        """Return the token ids of a question as one user turn.

        Raises:
            ConfigError: the template cannot render it, the question is not in the prompt, a token is beyond the
                vocabulary, or the tokenizer ends the prompt with an end token.
        """
        token_ids = encode_prompt(self._tokenizer, question)
        self._check_ids(token_ids)
        # A template may leave out reasoning in earlier turns of the assistant.
        given = [each["content"] for each in chat_messages(question) if each["role"] != "assistant"]
        missing = next((text for text in given if not self._contains(token_ids, text)), None)
        if missing is not None:
            kind = ConfigError if isinstance(question, str) else DataError  # other conversations may be rendered
            raise kind(
                f"{self._tokenizer.name_or_path}: expected the question in its prompt, found "
                f"{self._decoded(token_ids)[:200]!r} for {missing[:80]!r}; the chat template must write "
                "message['content'] as text"
            )
        if not self._tokenizer.chat_template and token_ids[-1:] == [self._tokenizer.eos_token_id]:
            raise ConfigError(
                f"{self._tokenizer.name_or_path}: expected a prompt that the model continues, but the tokenizer ends "
                f"it with the end token {self._tokenizer.eos_token!r}; set add_eos_token to false in "
                "tokenizer_config.json, or take the end token out of the post-processor in tokenizer.json"
            )
        return token_ids

    def demonstration(self, question: Question, chain: Chain) -> tuple[list[int], list[bool]]:
        """Return the token ids of prompt, chain and end token, and which of them the policy writes.

        Raises:
            ConfigError: a token is beyond the vocabulary, or the template cannot render the question.
        """
        token_ids, own = encode_demonstration(self._tokenizer, question, chain, self._turns)
        self._check_ids(token_ids)
        return token_ids, own

    def text(self, text: str) -> list[int]:
        """Return the token ids of a text inside a completion.

        Raises:
            ConfigError: a token is beyond the vocabulary.
        """
        token_ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        self._check_ids(token_ids)
        return token_ids

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        largest = max(token_ids, default=0)
        if self._vocabulary is not None and largest >= self._vocabulary:
            raise ConfigError(
                f"{self._tokenizer.name_or_path}: token id {largest} "
                f"({self._tokenizer.convert_ids_to_tokens(largest)!r}) is beyond the vocabulary of the model, which "
                f"has {self._vocabulary} tokens (vocab_size of config.json); resize the model's embeddings to "
                f"{largest + 1} or more, or take the token out of the tokenizer and its chat template"
            )

    def _contains(self, token_ids: Sequence[int], question: str) -> bool:
        """Return whether the decoded prompt has the question, apart from case, spaces and punctuation."""
        prompt = self._decoded(token_ids)
        if _is_in(question, prompt):
            return True
        # Some tokenizers change a text, for example its accents. The question is then compared in the changed form.
        changed = self._decoded(self._tokenizer(question, add_special_tokens=False)["input_ids"])
        return bool(changed.strip()) and _is_in(changed, prompt)

    def _decoded(self, token_ids: Sequence[int]) -> str:
        return decode_prompt(self._tokenizer, token_ids)


def decode_prompt(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Return the text of a prompt, with its special tokens."""
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _is_in(text: str, prompt: str) -> bool:
    """Return whether a prompt has the letters and digits of a text, or its other characters if it has none."""
    keep = str.isalnum if any(map(str.isalnum, text)) else lambda character: not character.isspace()
    wanted, present = ("".join(filter(keep, each)).casefold() for each in (text, prompt))
    return wanted in present


def end_token_id(tokenizer: Any) -> int:
    """Return the tokenizer's end-of-sequence token."""
    return int(tokenizer.eos_token_id)


def end_token_ids(tokenizer: Any, folder: Path) -> list[int]:
    """Return all tokens that end a completion, the tokenizer's own first.

    Chat models name the end of a turn in the tokenizer or in the generation config of the model folder.

    Raises:
        ConfigError: the generation config is not a JSON object, or names an end token by something else than its id.
    """
    named = named_tokens(folder / "generation_config.json")["eos_token_id"]
    return list(dict.fromkeys([end_token_id(tokenizer), *named]))


def named_tokens(path: Path) -> dict[str, list[int]]:
    """Return the ids of the special tokens that a JSON config names, by key, such as eos_token_id.

    Args:
        path: config.json or generation_config.json; without the file no token is named.

    Raises:
        ConfigError: the file is not a JSON object, or a value is neither an id nor a list of ids.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}")
    tokens: dict[str, list[int]] = {}
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        value = values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        wrong = [each for each in ids if isinstance(each, bool) or not isinstance(each, int)]
        if wrong:
            raise ConfigError(f"{path}: expected a token id or a list of ids as {key}, found {wrong[0]!r}")
        tokens[key] = ids
    return tokens
