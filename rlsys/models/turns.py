"""The token ids that an environment puts after a turn of the policy. No text of the policy is tokenised again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from rlsys.errors import ConfigError, DataError
from rlsys.models.chat_template import rendered
from rlsys.types import Message

_QUESTION, _TURN, _REPLY = "rlsys question", "rlsys turn", "rlsys reply"


class TurnEncoder:
    """Encoder of the texts of an environment for one tokenizer.

    With a role, the tokens around a text are those that the chat template renders between the end token of a turn and
    the next turn. They are tokenised once, apart from the text.

    Args:
        tokenizer: the tokenizer of the policy.
        role: environment.role.

    Attributes:
        end: the token that ends every turn of the policy; None without a role.

    Raises:
        ConfigError: the chat template cannot render a message with this role after a turn.
    """

    def __init__(self, tokenizer: Any, role: Literal["user", "tool"] | None) -> None:
        self._tokenizer = tokenizer
        self.end: int | None = None
        self._before: list[int] = []
        self._after: list[int] = []
        if role is not None:
            before, after = _frame(tokenizer, role)
            self.end, *self._before = self._ids(before)
            self._after = self._ids(after)

    def reply(self, text: str) -> list[int]:
        """Return the token ids between two turns of the policy. Special tokens in the text are plain characters."""
        return [*self._before, *self._ids(text, split_special_tokens=True), *self._after]

    def chain(self, pieces: Sequence[str], end: int) -> tuple[list[int], list[bool]]:
        """Return the token ids of a chain, and which of them the policy writes.

        Args:
            pieces: turns and texts of the environment; see `rlsys.types.Chain`.
            end: the end token, which follows a last turn.
        """
        token_ids: list[int] = []
        own: list[bool] = []
        for number, piece in enumerate(pieces):
            is_turn = number % 2 == 0
            new = self._ids(piece) if is_turn else self.reply(piece)
            if is_turn and (self.end is not None or number == len(pieces) - 1):
                new.append(end if self.end is None else self.end)
            token_ids += new
            own += [is_turn] * len(new)
        return token_ids, own

    def _ids(self, text: str, **options: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"])


def opening_ids(
    text: str,
    encode: Callable[[str], list[int]],
    role: str | None,
    prompt_tokens: int,
    max_model_len: int,
    field: str = "actors.max_model_len",
) -> list[int]:
    """Return the token ids of an environment's text before the first turn. Episodes, trees and `rlsys check` ask here.

    Args:
        text: may be empty.
        encode: `TurnEncoder.reply` of the model that reads the text.
        role: environment.role.
        prompt_tokens: tokens of the prompt.
        max_model_len: tokens of an episode, prompt included.
        field: the config field of this limit.

    Raises:
        DataError: a role cannot have the text before a turn, or no room is left for a turn.
    """
    if text and role is not None:
        raise DataError("a text before the first turn needs environment.role null; put it into the question")
    token_ids = encode(text) if text else []
    if prompt_tokens + len(token_ids) >= max_model_len:
        raise DataError(
            f"the text before the first turn has {len(token_ids)} tokens, too many for {field} {max_model_len} after "
            f"the {prompt_tokens} of the prompt"
        )
    return token_ids


def _frame(tokenizer: Any, role: str) -> tuple[str, str]:
    """Return what the template writes between a turn and a reply, and between the reply and the next turn."""
    expected = f"environment.role {role}: expected a chat template that renders a message with this role after a turn"
    messages = (
        Message(role="user", content=_QUESTION),
        Message(role="assistant", content=_TURN),
        Message(role=role, content=_REPLY),
    )
    try:
        text = rendered(tokenizer, messages, add_generation_prompt=True)
    except DataError as error:
        raise ConfigError(f"{expected}: {error.message}; choose another role, or null") from None
    _, _, rest = text.partition(_TURN)
    before, reply, after = rest.partition(_REPLY)
    end = str(tokenizer.eos_token)
    if not reply or not before.startswith(end):
        raise ConfigError(
            f"{expected}, and ends the turn with {end!r}; found {text[:300]!r}; choose another role, or null"
        )
    return before, after
