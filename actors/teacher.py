"""Scores of a teacher for the trajectories of an actor, from engines of the teacher's own."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

from actors.model_actor import RemoteEngine
from actors.settings import TeacherEngines
from rlsys.errors import RolloutError
from rlsys.sequences import teacher_tokens
from rlsys.types import RolloutFailure, TeacherTokens, Trajectory, TrajectoryGroup


class Teacher:
    """The teacher, as one actor asks it.

    Args:
        engines: Engines of the teacher, which take the rows in turn.
        caller: Name of this process.
    """

    def __init__(self, engines: TeacherEngines, caller: str) -> None:
        self.engine = RemoteEngine(engines.handles, "teacher", caller)
        self._tokens = engines.tokens
        self._numbers = itertools.count()

    async def score_group(self, group: TrajectoryGroup | RolloutFailure) -> TrajectoryGroup | RolloutFailure:
        """Return a group with the teacher's scores of all its trajectories, or a failure if it refused one of them."""
        if isinstance(group, RolloutFailure):
            return group
        try:
            scores = await asyncio.gather(*map(self._score, group.trajectories))
        except RolloutError as error:
            tokens = sum(trajectory.completion_length for trajectory in group.trajectories)
            return RolloutFailure(prompt=group.prompt, reason=f"teacher: {error.message}", tokens=tokens)
        pairs = zip(group.trajectories, scores, strict=True)
        return replace(group, trajectories=tuple(replace(trajectory, teacher=score) for trajectory, score in pairs))

    async def _score(self, trajectory: Trajectory) -> TeacherTokens:
        """Return the scores of the tokens that the policy chose."""
        future = self.engine.score(trajectory.token_ids.tolist(), self._tokens, next(self._numbers))
        ids, logprobs = await asyncio.wrap_future(future)
        return teacher_tokens(trajectory.loss_mask, ids, logprobs)
