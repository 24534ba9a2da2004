"""A scripted world of trees with replies of an environment, and the episodes that play their chains again.

A turn ends after </hypothesis>. A reply stands between tags that the table does not know.
"""

from __future__ import annotations

import asyncio
import random
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from search_world import MARK, Grown, World, codec, grow, prompt, search_config, search_model, spoken, table

from actors.engine import Completion, CompletionRequest
from actors.rollouts.multi_turn import Episodes
from actors.search.requests import Call, SearchModel
from actors.search.turns import SearchedEnvironment
from rlsys.config.environment import EnvironmentConfig
from rlsys.interfaces import Reply
from rlsys.models.turns import TurnEncoder
from rlsys.trees import ENVIRONMENT
from rlsys.types import Problem, SamplingSettings, Trajectory, TrajectoryGroup, Verdict, VersionSpan

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


class Players(World):
    """A policy that calls the environment at random, and an environment that pays at random and sometimes fails."""

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


class _Again:
    """Engine and judges of one episode, whose turns are those of a chain."""

    def __init__(self, world: Any, turns: list[list[int]]) -> None:
        self.world, self.turns = world, turns

    def submit(self, requests: Sequence[CompletionRequest]) -> list[Future[Completion]]:
        futures = []
        for _ in requests:
            future: Future[Completion] = Future()
            ids = np.array(self.turns.pop(0), dtype=np.int32)
            span = VersionSpan(start=0, version=0)
            zeros = np.zeros(len(ids), dtype=np.float32)
            future.set_result(Completion(token_ids=ids, logprobs=zeros, finish_reason="stop", versions=(span,)))
            futures.append(future)
        return futures

    async def verify(self, items: Sequence[tuple[Problem, str, bool]]) -> list[Verdict]:
        return [self.world.judge(text) for _, text, _ in items]

    async def replies(self, items: Sequence[tuple[Problem, Sequence[str]]]) -> list[Reply | Verdict]:
        return [self.world.reply(turns) if turns else Reply() for _, turns in items]


def play_again(world: Any, token_ids: Sequence[int], replies: Sequence[tuple[int, int]], **bounds: Any) -> Trajectory:
    """Return the episode whose turns are those of a chain.

    Args:
        token_ids: the chain, prompt first.
        replies: begin and end of each reply in it.
    """
    model, given = search_model(), prompt()
    edges = [len(model.prompt_ids), *(edge for span in replies for edge in span), len(token_ids)]
    turns = [list(token_ids[edges[n] : edges[n + 1]]) for n in range(0, len(edges), 2)]
    if STOP not in codec().decode(turns[-1]) and turns[-1][-1] not in codec().end_token_ids:
        turns[-1].append(codec().end_token_id)  # an answer of node expansion ends at its tag
    again: Any = _Again(world, turns)
    config = environment(**bounds).config
    episodes = Episodes(again, again, TOKENIZER, [codec().end_token_id], config, model.max_model_len)
    settings = SamplingSettings(samples=1, temperature=1.0, top_p=1.0, max_tokens=500, seed=0)

    async def run() -> Trajectory:
        [playing] = await episodes.start([given], settings)
        group = await playing
        assert isinstance(group, TrajectoryGroup)
        return group.trajectories[0]

    return asyncio.run(run())
