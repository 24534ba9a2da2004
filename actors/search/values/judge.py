"""Values by a judge model or a process reward model, which answers with one of two words.

The judge reads the question and the chain up to a node. The value is p(right) / (p(right) + p(wrong)), with the
probabilities of the first tokens of both words as the beginning of its answer.
Sources: LLM-as-a-judge by the logits of an answer; Math-Shepherd, arXiv:2312.08935, whose tokens are + and -.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from actors.search.requests import Value, Values
from actors.search.values.shape import raise_first, shaped
from rlsys.config.search_values import ModelValueConfig
from rlsys.errors import ConfigError, RolloutError
from rlsys.models.chat import CheckedEncoder, encode_prompt
from rlsys.models.chat_template import chat_messages
from rlsys.models.folder import ModelFolder
from rlsys.types import Prompt

log = logging.getLogger(__name__)


class ScoringEngine(Protocol):
    """See `actors.model_actor.RemoteEngine`."""

    def score(self, token_ids: Sequence[int], tokens: int | None, affinity: int) -> Future[Any]: ...


class JudgeValuer:
    """Source of values.

    Args:
        engine: Engines of the judge.
        model: Folder of the judge.

    Raises:
        ConfigError: See `answer_tokens`.
    """

    def __init__(self, engine: ScoringEngine, model: ModelFolder, config: ModelValueConfig) -> None:
        self._engine, self._tokenizer, self._template = engine, model.tokenizer, config.template
        self._answers = answer_tokens(model, config)

    async def values(self, prompt: Prompt, request: Value, affinity: int) -> Values:
        rows = []
        for line in request.lines:
            for number in range(len(line.texts)):
                context = self._context(prompt, line.chain(number))
                rows += [[*context, token] for token in self._answers]
        futures = [self._engine.score(row, None, affinity) for row in rows]
        outcomes: list[Any] = await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
        raise_first(outcomes, RolloutError)
        refused = [each for each in outcomes if isinstance(each, RolloutError)]
        if refused:
            log.warning("prompt %s: the judge refused a chain: %s", prompt.prompt_id, refused[0].message)
        scores = [None if isinstance(each, RolloutError) else float(each[1][-1, 0]) for each in outcomes]
        values = [_share(right, wrong) for right, wrong in zip(scores[::2], scores[1::2], strict=True)]
        failed = values.count(None)
        return Values(values=shaped(request, values), failed={"error": failed} if failed else {})

    def _context(self, prompt: Prompt, chain: str) -> list[int]:
        question = "\n\n".join(message["content"] for message in chat_messages(prompt.question))
        texts = {"{question}": question, "{chain}": chain}
        text = re.sub("|".join(map(re.escape, texts)), lambda match: texts[match[0]], self._template)
        return encode_prompt(self._tokenizer, text)


def answer_tokens(model: ModelFolder, config: ModelValueConfig) -> tuple[int, int]:
    """Return the first tokens of the two answers of a judge.

    Raises:
        ConfigError: An answer has no token, or both begin with the same one.
    """
    encoder = CheckedEncoder(model.tokenizer, model.vocabulary)
    right, wrong = (encoder.text(text)[:1] for text in (config.right, config.wrong))
    if not right or not wrong or right == wrong:
        raise ConfigError(
            f"search.value.right {config.right!r} and search.value.wrong {config.wrong!r}: expected texts that begin "
            f"with different tokens of {model.path}, found {right or 'none'} and {wrong or 'none'}; change one of them"
        )
    return right[0], wrong[0]


def _share(right: float | None, wrong: float | None) -> float | None:
    """Return p(right) / (p(right) + p(wrong)) for two log-probabilities in nats; None if one is missing."""
    if right is None or wrong is None or max(right, wrong) == -math.inf:
        return None
    return 1 / (1 + math.exp(wrong - right)) if right >= wrong else 1 - 1 / (1 + math.exp(right - wrong))
