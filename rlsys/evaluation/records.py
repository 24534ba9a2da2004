"""Judged completions as `rlsys evaluate` keeps them: as texts, so that models with different tokenizers compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlsys.models.folder import ModelFolder
from rlsys.search.votes import Candidate
from rlsys.tasks.answers.extraction import find_answer
from rlsys.tasks.answers.normalise import normalise
from rlsys.types import WHOLE, Message, Problem, Prompt, Trajectory, TrajectoryGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One judged completion of a problem.

    Attributes:
        text: The text that the verifier judged.
        tokens: Number of generated tokens, the end token included.
        right: Whether the verifier accepts the answer.
        reward: Reward, with those of reward functions and environment; 0 without a verdict.
        judged: Whether the verifier reached a verdict.
        answered: Whether the verifier finds a valid answer.
        truncated: See `Trajectory.truncated`.
        out_of_turns: Whether it is an episode that used up its turns.
        reason: The verifier's reason; "" if it gives none.
        logprob: Mean log-probability of the tokens, in nats.
    """

    text: str
    tokens: int
    right: bool
    reward: float
    judged: bool
    answered: bool
    truncated: bool
    out_of_turns: bool
    reason: str
    logprob: float


Rows = Sequence[Sequence[Sample]]
"""The samples of every problem, in order."""


def samples_of(group: TrajectoryGroup, model: ModelFolder, joint: str = "") -> list[Sample]:
    """Return the judged completions of a group, read by the tokenizer of a model; see `completion_text`."""
    return [_sample(trajectory, model, joint) for trajectory in group.trajectories]


def _sample(trajectory: Trajectory, model: ModelFolder, joint: str) -> Sample:
    tokens = trajectory.completion_length
    return Sample(
        text=completion_text(trajectory, model, joint),
        tokens=tokens,
        right=trajectory.correct,
        reward=trajectory.reward if trajectory.judged else 0.0,
        judged=trajectory.judged,
        answered=trajectory.answered,
        truncated=trajectory.truncated,
        out_of_turns=trajectory.finish_reason == "turns",
        reason=trajectory.detail,
        logprob=float(trajectory.behavior_logprobs.sum()) / max(1, tokens),
    )


def completion_text(trajectory: Trajectory, model: ModelFolder, joint: str = "") -> str:
    """Return the text that the verifier judged: that of all turns of the policy, without their end tokens.

    Args:
        joint: stands between turns that end with a token of the chat template; see `environment.role`.
    """
    own = np.flatnonzero(trajectory.loss_mask)
    texts = []
    for places in np.split(own, np.flatnonzero(np.diff(own) > 1) + 1):
        ids = trajectory.token_ids[places].tolist()
        ended = trajectory.finish_reason in WHOLE or (len(places) and places[-1] != own[-1])
        if ended and ids and ids[-1] in model.end_token_ids:
            ids.pop()
        texts.append(str(model.tokenizer.decode(ids)))
    return joint.join(texts)


def candidates(samples: Sequence[Sample]) -> list[Candidate]:
    """Return the answers of the samples of a problem. Their value is the mean log-probability of the sample."""
    answers, tokens = [], 0
    for sample in samples:
        tokens += sample.tokens
        answer = find_answer(sample.text) if sample.answered else None
        key = normalise(answer.text) if answer else None
        answers.append(Candidate(text=key, right=sample.right, tokens=tokens, value=sample.logprob))
    return answers


def problems_digest(problems: Sequence[Problem] | Sequence[Prompt]) -> str:
    """Return the sha256 of questions and answers, in order. Two models compare only on the same problems."""
    rows = [[_question_parts(problem.question), problem.answer] for problem in problems]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _question_parts(question: str | tuple[Message, ...]) -> list[list[str]]:
    if isinstance(question, str):
        return [["user", question]]
    return [[message.role, message.content] for message in question]
