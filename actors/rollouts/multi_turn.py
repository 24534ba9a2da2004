"""Episodes: completions of several turns, in which an environment answers every turn of the policy.

Every episode goes on by itself as soon as its turn is drawn and answered, so the batch of the engine never waits for
the slowest one. The next request has the exact token ids so far and those of the environment's text.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from actors.engine import Completion, CompletionRequest
from actors.rollouts.seeds import sample_seed
from actors.rollouts.single_turn import name_failures
from rlsys.config.environment import EnvironmentConfig
from rlsys.config.rewards import ENVIRONMENT, TASK
from rlsys.errors import DataError, RolloutError
from rlsys.interfaces import Reply
from rlsys.models.turns import TurnEncoder, opening_ids
from rlsys.types import (
    WHOLE,
    FinishReason,
    Problem,
    Prompt,
    RolloutFailure,
    SamplingSettings,
    Trajectory,
    TrajectoryGroup,
    Verdict,
    VersionSpan,
)

log = logging.getLogger(__name__)


class TurnEngine(Protocol):
    """The engine, as episodes ask it; see `actors.engine.Engine`."""

    def submit(self, requests: Sequence[CompletionRequest]) -> list[Future[Completion]]: ...


class Judges(Protocol):
    """Verifier and environment; see `actors.verifiers.pool.RewardPool`."""

    async def verify(self, items: Sequence[tuple[Problem, str, bool]]) -> list[Verdict]: ...

    async def replies(self, items: Sequence[tuple[Problem, Sequence[str]]]) -> list[Reply | Verdict]: ...


@dataclass(slots=True, kw_only=True)
class Episode:
    """An episode so far.

    Attributes:
        number: number of the sample of its prompt.
        token_ids: the prompt and all tokens after it.
        own: whether the policy chose each of these tokens.
        logprobs: nats, of the tokens that the policy chose; 0 for the others.
        versions: see `Trajectory.versions`.
        turns: texts of the policy.
        replies: answers of the environment to these turns.
        failure: why the environment failed; None while it has not.
        finish_reason: why the episode ended.
    """

    prompt: Prompt
    number: int
    token_ids: list[int]
    own: list[bool]
    logprobs: list[float]
    versions: list[VersionSpan] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    failure: Verdict | None = None
    finish_reason: FinishReason = "stop"

    @property
    def own_tokens(self) -> int:
        """Number of tokens that the policy chose."""
        return sum(self.own)

    def force(self, token_ids: Sequence[int]) -> None:
        """Add tokens that the policy did not choose."""
        self.token_ids += token_ids
        self.own += [False] * len(token_ids)
        self.logprobs += [0.0] * len(token_ids)

    def draw(self, completion: Completion, text: str) -> None:
        """Add a turn of the policy."""
        start = len(self.token_ids)
        self.versions += [replace(span, start=start + span.start) for span in completion.versions]
        self.token_ids += completion.token_ids.tolist()
        self.own += [True] * len(completion.token_ids)
        self.logprobs += completion.logprobs.tolist()
        self.turns.append(text)
        self.finish_reason = completion.finish_reason


class Episodes:
    """The episodes of one actor.

    Args:
        tokenizer: the tokenizer of the policy.
        end_token_ids: tokens that end a completion.
        config: the environment in use.
        max_model_len: tokens of an episode, prompt included.
    """

    def __init__(
        self,
        engine: TurnEngine,
        judges: Judges,
        tokenizer: Any,
        end_token_ids: Sequence[int],
        config: EnvironmentConfig,
        max_model_len: int,
    ) -> None:
        self._engine, self._judges, self._tokenizer = engine, judges, tokenizer
        self._ends, self._config, self._max_model_len = frozenset(end_token_ids), config, max_model_len
        self._encoder = TurnEncoder(tokenizer, config.role)

    async def start(
        self, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> list[Coroutine[Any, Any, TrajectoryGroup | RolloutFailure]]:
        """Submit the first turns of all episodes, and return the groups of the prompts, in order, to be awaited."""
        openings = await self._judges.replies([(prompt.problem, ()) for prompt in prompts])
        groups = [
            [self._begin(prompt, number, opening) for number in range(settings.samples)]
            for prompt, opening in zip(prompts, openings, strict=True)
        ]
        open_episodes = [each for group in groups for each in group if each.finish_reason != "abort"]
        # In one call, so that the first batch of the engine does not depend on timing.
        futures = iter(self._engine.submit([self._request(each, settings) for each in open_episodes]))
        first = [[None if each.finish_reason == "abort" else next(futures) for each in group] for group in groups]
        return [
            self._group(prompt, group, turns, settings)
            for prompt, group, turns in zip(prompts, groups, first, strict=True)
        ]

    async def _group(
        self,
        prompt: Prompt,
        episodes: Sequence[Episode],
        turns: Sequence[Future[Completion] | None],
        settings: SamplingSettings,
    ) -> TrajectoryGroup | RolloutFailure:
        """Return the group of a prompt, or a failure if the engine refused one of its requests."""
        plays = (
            self._play(episode, turn, settings)
            for episode, turn in zip(episodes, turns, strict=True)
            if turn is not None
        )
        for outcome in await asyncio.gather(*plays, return_exceptions=True):
            if isinstance(outcome, RolloutError):
                tokens = sum(episode.own_tokens for episode in episodes)
                return RolloutFailure(prompt=prompt, reason=outcome.message, tokens=tokens)
            if outcome is not None:
                raise outcome
        judged = [episode for episode in episodes if episode.failure is None]
        verdicts = iter(
            await self._judges.verify(
                [(prompt.problem, self._config.joint.join(each.turns), each.finish_reason in WHOLE) for each in judged]
            )
        )
        final = [each.failure or with_replies(next(verdicts), each.replies) for each in episodes]
        final = name_failures(final, [self._config.joint.join(each.turns) for each in episodes])
        failed = [verdict for verdict in final if verdict.outcome in ("error", "timeout")]
        if failed:
            count, first = f"{len(failed)} of {len(final)}", failed[0]
            log.warning("prompt %s: %s episodes failed: %s", prompt.prompt_id, count, first.detail)
        trajectories = tuple(_trajectory(*pair) for pair in zip(episodes, final, strict=True))
        return TrajectoryGroup(prompt=prompt, trajectories=trajectories)

    async def _play(self, episode: Episode, turn: Future[Completion], settings: SamplingSettings) -> None:
        """Draw turns and ask the environment until the episode ends."""
        while True:
            completion = await asyncio.wrap_future(turn)
            last = int(completion.token_ids[-1]) if completion.finish_reason == "stop" else None
            cut = len(completion.token_ids) - (last in self._ends)
            episode.draw(completion, self._tokenizer.decode(completion.token_ids[:cut].tolist()))
            if last is None:  # cut off: there is no whole turn to answer
                return
            [reply] = await self._judges.replies([(episode.prompt.problem, episode.turns)])
            if isinstance(reply, Verdict):
                episode.failure = environment_failure(reply)
                return
            episode.replies.append(reply)
            # Without a role nothing follows an end token; with one, a turn ends with the token of the chat template.
            if reply.done or (last in self._ends if self._encoder.end is None else last != self._encoder.end):
                return
            forced = self._encoder.reply(reply.text)
            if len(episode.turns) == self._config.max_turns:
                episode.finish_reason = "turns"
                return
            if self._room(episode, len(forced), settings) < 1:
                episode.finish_reason = "length"
                return
            episode.force(forced)
            [turn] = self._engine.submit([self._request(episode, settings)])

    def _begin(self, prompt: Prompt, number: int, opening: Reply | Verdict) -> Episode:
        """Return an episode before its first turn. Its finish reason is "abort" if it has none."""
        count = len(prompt.token_ids)
        episode = Episode(
            prompt=prompt,
            number=number,
            token_ids=prompt.token_ids.tolist(),
            own=[False] * count,
            logprobs=[0.0] * count,
        )
        if isinstance(opening, Verdict):
            episode.failure = environment_failure(opening)
        else:
            try:
                limits = self._config.role, count, self._max_model_len
                episode.force(opening_ids(opening.text, self._encoder.reply, *limits))
            except DataError as error:
                verdict = Verdict(outcome="error", reward=0.0, answered=False, detail=error.message)
                episode.failure = environment_failure(verdict)
        episode.finish_reason = "abort" if episode.failure else "stop"
        return episode

    def _room(self, episode: Episode, forced: int, settings: SamplingSettings) -> int:
        """Return the number of tokens that the policy may still choose, after `forced` tokens of the environment."""
        space = self._max_model_len - len(episode.token_ids) - forced
        return min(settings.max_tokens - episode.own_tokens, space)

    def _request(self, episode: Episode, settings: SamplingSettings) -> CompletionRequest:
        prompt, number, turn = episode.prompt, episode.number, len(episode.turns)
        return CompletionRequest(
            request_id=f"{prompt.prompt_id}#{number}.{turn}/{settings.temperature}",
            token_ids=tuple(episode.token_ids),
            seed=sample_seed(settings.seed, prompt.prompt_id, f"{number}.{turn}"),
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=self._room(episode, 0, settings),
            stop_strings=self._config.stop,
        )


def with_replies(verdict: Verdict, replies: Sequence[Reply]) -> Verdict:
    """Return the verdict of a task with the rewards of the environment. A failed one stays as it is.

    The last reply that says whether the problem is solved has the say about it. If none does and the task does not
    judge answers (see `Verdict`), an answer is right if the sum is above 0.
    """
    if verdict.outcome not in ("ok", "wrong"):
        return verdict
    reward = sum(reply.reward for reply in replies)
    solved = next((reply.solved for reply in reversed(replies) if reply.solved is not None), None)
    if not reward and solved is None:
        return verdict
    is_unjudged = verdict.outcome == "ok" and not verdict.correct
    right = verdict.correct or (is_unjudged and verdict.reward + reward > 0) if solved is None else solved
    return Verdict(
        outcome="ok" if right else "wrong",
        reward=verdict.reward + reward,
        answered=verdict.answered or solved is not None,
        detail=replies[-1].detail or verdict.detail,
        parts={**(verdict.parts or ({} if is_unjudged else {TASK: verdict.reward})), ENVIRONMENT: reward},
    )


def environment_failure(verdict: Verdict) -> Verdict:
    """Return the verdict on an episode whose environment failed."""
    return replace(verdict, detail=f"environment: {verdict.detail}")


def _trajectory(episode: Episode, verdict: Verdict) -> Trajectory:
    return Trajectory(
        token_ids=np.array(episode.token_ids, dtype=np.int32),
        loss_mask=np.array(episode.own, dtype=np.bool_),
        behavior_logprobs=np.array(episode.logprobs, dtype=np.float32),
        versions=tuple(episode.versions),
        finish_reason=episode.finish_reason,
        reward=verdict.reward,
        outcome=verdict.outcome,
        answered=verdict.answered,
        detail=verdict.detail,
        parts=verdict.parts,
        turns=len(episode.turns),
        environment_failed=episode.failure is not None,
    )
