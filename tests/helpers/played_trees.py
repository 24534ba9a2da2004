"""A scripted world of trees with replies of an environment, and the episodes that play their chains again.

A turn ends after </hypothesis>. A reply stands between tags that the table does not know.
"""

from __future__ import annotations

import asyncio
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from search_world import MARK, Grown, World, codec, grow, prompt, search_config, search_model, spoken, table

from actors.engine import Completion, CompletionRequest
from actors.rollouts.multi_turn import Episodes
from actors.search.requests import Call, SearchModel
from actors.search.turns import SearchedEnvironment
from rlsys.config.environment import EnvironmentConfig
from rlsys.config.rewards import RewardsConfig
from rlsys.interfaces import Reply
from rlsys.models.turns import TurnEncoder
from rlsys.rewards import Rewards
from rlsys.tasks.answers.judge import Judge
from rlsys.trees import ENVIRONMENT
from rlsys.types import (
    FinishReason,
    Problem,
    SamplingSettings,
    Trajectory,
    TrajectoryGroup,
    Verdict,
    VersionSpan,
)

CALL, STOP = "hypothesis", "</hypothesis>"
NEXT = {"thinking": 2, CALL: 2, "answer": 1}
CHILDREN: Mapping[str, Mapping[str, int]] = {
    "start": {"thinking": 3, CALL: 3},
    "thinking": NEXT,
    CALL: {ENVIRONMENT: 1},
    ENVIRONMENT: NEXT,
}
SEARCHES: Mapping[str, Mapping[str, Any]] = {
    "node": {"expansion": "node"},
    "puct": {"expansion": "node", "selection": {"type": "puct"}},
    "frontier": {"expansion": "node", "selection": {"type": "frontier"}},
    "chain": {"expansion": "chain"},
    "surprise": {"expansion": "chain", "selection": {"type": "surprise"}},
    "places": {"expansion": "chain", "selection": {"type": "surprise", "unit": "node"}},
    "revision": {"expansion": "chain", "selection": {"type": "revision"}},
    "values": {"expansion": "chain", "value": {"type": "function", "fn": "a:b", "prune_below": 0.5}},
    "values of nodes": {"expansion": "node", "value": {"type": "function", "fn": "a:b"}},
    "agreement": {"expansion": "chain", "value": {"type": "agreement"}},
    "backtracking": {"expansion": "chain", "backtracking": True, "max_backtracks": 2},
    "backtracking of nodes": {"expansion": "node", "backtracking": True},
}
TOKENIZER: Any = codec()._tokenizer


def answered(letters: str) -> str:
    """Return the text of a reply."""
    return f"<reclarify>{letters}</reclarify>"


RULES = Judge(accept_cut_off=True)
REWARDS = Rewards(
    RewardsConfig.model_validate(
        {"functions": [{"fn": "format"}, {"fn": "length", "arguments": {"start": 20, "end": 90}}]}
    ),
    "",
)
JUDGES: Mapping[str, Callable[[str, bool], Verdict]] = {
    "cut-off answers": partial(RULES.verdict, "1"),
    "functions": lambda text, finished: REWARDS.verdict(prompt().problem, text, Judge().verdict("1", text, finished)),
    "no reference": lambda text, finished: Verdict(outcome="ok", reward=0.0, answered=finished and bool(text.strip())),
}
"""Judges of a text and whether it is finished."""


@dataclass(frozen=True, kw_only=True)
class Players(World):
    """A policy that calls the environment at random, and an environment that pays at random and sometimes fails.

    Attributes:
        judging: name of the judge in JUDGES; None for that of `World`.
    """

    judging: str | None = None

    def judge(self, chain: str, finished: bool = True) -> Verdict:
        return JUDGES[self.judging](chain, finished) if self.judging else super().judge(chain, finished)

    def complete(self, call: Call, model: SearchModel) -> Completion:
        said = model.codec.decode(call.token_ids[len(model.prompt_ids) :])
        rng = random.Random(f"{said}/{call.seed}")
        marks = list(MARK.finditer(said))
        slash, tag = marks[-1].groups() if marks else ("/", "start")
        text = "" if slash else f"{self._body(tag, rng)}</{tag}>"
        kind = {"reclarify": ENVIRONMENT}.get(tag, tag)
        while kind not in ("answer", CALL):
            row = self.pattern.children[kind]
            kind = rng.choice([name for name, count in row.items() for _ in range(count)])
            text += f"<{kind}>{self._body(kind, rng)}</{kind}>"
            if rng.random() < self.defects:
                text += "b"
        return spoken(call, model.codec, text)

    def reply(self, turns: Sequence[str]) -> Reply | Verdict:
        rng = random.Random(zlib.crc32("|".join(turns).encode()))
        if rng.random() < self.failures:
            return Verdict(outcome="error", reward=0.0, answered=False, detail="it raised")
        done = STOP in turns[-1] and rng.random() < 0.1
        text = answered("".join(rng.choices("ab", k=rng.randint(0, 3)))) if STOP in turns[-1] else ""
        return Reply(text=text, done=done, reward=rng.choice((0.0, 0.25)), solved=rng.choice((None, None, True, False)))


def environment(**fields: Any) -> SearchedEnvironment:
    config = EnvironmentConfig(**{"fn": "a:b", "stop": (STOP,), "max_turns": 4, **fields})
    return SearchedEnvironment(config, TurnEncoder(TOKENIZER, None).reply)


def played(world: Any, *, bounds: Mapping[str, Any] = {}, searched: Mapping[str, Any] = {}, **fields: Any) -> Grown:
    """Return a tree.

    Args:
        bounds: fields of the section `environment`.
        searched: fields of the section `search`.
        fields: arguments of `search_world.grow`.
    """
    config = search_config(**{"backtracking": False, **searched})
    return grow(world, config, environment=environment(**bounds), **fields)


def players(**fields: Any) -> Players:
    """Return a world. A wrong answer after a reply gives this reply one more child."""
    after_wrong = {ENVIRONMENT: {"reflection": 1}, "thinking": {"reflection": 1}}
    return Players(pattern=table({**CHILDREN, "reflection": {"thinking": 1}}, after_wrong), **fields)


def verdict_of(chain: Trajectory) -> Verdict:
    names = ("outcome", "reward", "answered", "detail", "parts")
    return Verdict(**{name: getattr(chain, name) for name in names})


class EpisodeGoesOnError(Exception):
    """An episode goes on where its chain has ended."""


class _Again:
    """Engine and judges of one episode, whose turns are those of a chain. The last one may be cut off."""

    def __init__(self, world: Any, turns: list[list[int]], is_cut_off: bool) -> None:
        self.world, self.turns, self.is_cut_off = world, turns, is_cut_off

    def submit(self, requests: Sequence[CompletionRequest]) -> list[Future[Completion]]:
        futures = []
        for _ in requests:
            if not self.turns:
                raise EpisodeGoesOnError
            future: Future[Completion] = Future()
            ids = np.array(self.turns.pop(0), dtype=np.int32)
            span = VersionSpan(start=0, version=0)
            zeros = np.zeros(len(ids), dtype=np.float32)
            end: FinishReason = "length" if self.is_cut_off and not self.turns else "stop"
            future.set_result(Completion(token_ids=ids, logprobs=zeros, finish_reason=end, versions=(span,)))
            futures.append(future)
        return futures

    async def verify(self, items: Sequence[tuple[Problem, str, bool]]) -> list[Verdict]:
        return [self.world.judge(text, finished) for _, text, finished in items]

    async def replies(self, items: Sequence[tuple[Problem, Sequence[str]]]) -> list[Reply | Verdict]:
        return [self.world.reply(turns) if turns else Reply() for _, turns in items]


def play_again(world: Any, chain: Trajectory, *, max_tokens: int = 500, **bounds: Any) -> Trajectory:
    """Return the episode whose turns are those of a chain.

    Args:
        chain: the chain, as a trajectory of its tree.
        max_tokens: tokens of the policy in the episode.
        bounds: fields of the section `environment`.

    Raises:
        EpisodeGoesOnError: the episode goes on after the last turn of the chain.
    """
    model, given = search_model(), prompt()
    edges = [len(model.prompt_ids), len(chain.token_ids)]
    edges[1:1] = [edge for step in chain.steps if step.type == ENVIRONMENT for edge in (step.start, step.stop)]
    turns = [chain.token_ids[edges[n] : edges[n + 1]].tolist() for n in range(0, len(edges), 2)]
    has_ended = STOP in codec().decode(turns[-1]) or turns[-1][-1] in codec().end_token_ids
    is_cut_off = chain.finish_reason == "length" and not has_ended
    if not has_ended and not is_cut_off:
        turns[-1].append(codec().end_token_id)  # an answer of node expansion ends at its tag
    again: Any = _Again(world, turns, is_cut_off)
    config = environment(**bounds).config
    episodes = Episodes(again, again, TOKENIZER, [codec().end_token_id], config, model.max_model_len)
    settings = SamplingSettings(samples=1, temperature=1.0, top_p=1.0, max_tokens=max_tokens, seed=0)

    async def run() -> Trajectory:
        [playing] = await episodes.start([given], settings)
        group = await playing
        assert isinstance(group, TrajectoryGroup)
        return group.trajectories[0]

    return asyncio.run(run())
