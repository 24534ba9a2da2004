"""Define every dataclass that crosses a process boundary, with numpy and the standard library only.

Shapes: T tokens of one trajectory, G trajectories of a group, B rows, P pairs.
Log-probabilities are in nats, under the distribution that was actually sampled from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

Split = Literal["train", "held_out"]
Outcome = Literal["ok", "wrong", "error", "timeout"]
FinishReason = Literal["stop", "length", "turns", "abort"]
"""By itself or its environment; cut off by a bound of tokens; after the last turn of an episode; by an error."""
WHOLE: tuple[FinishReason, ...] = ("stop", "turns")  # ends of completions that were not cut off
OPTIONAL = {"optional": True}
"""Metadata of a field that files leave out if it has its default, so that files from before the field still read."""
StageName = Literal["warm_start", "search", "sft", "preference", "online"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a conversation, under the names that chat templates read."""

    role: str
    content: str


Question = str | tuple[Message, ...]
"""The text of one user turn, or the conversation up to the turn that the policy writes."""

Chain = str | tuple[str, ...]
"""A completion as text, or turns of the policy and texts of its environment in alternation, with a turn first. After a
last text of the environment, the episode is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One question of a task, as text or as a conversation.

    Attributes:
        answer: the reference answer; "" if there is none.
        metadata: all else that a verifier or a reward function may see, by name: JSON values, such as the columns of a
            row.
    """

    problem_id: str
    question: Question
    answer: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The judgement of a verifier on one completion.

    Attributes:
        outcome: "ok" if the answer is right. A task that has nothing to compare an answer with gives "ok" with reward
            0; then an answer is right if the reward functions give it more than 0 together.
        reward: finite; 0.0 unless the outcome is "ok" or "wrong".
        answered: whether the completion has a valid answer; the no-answer rate counts completions without one.
        detail: the reason, for people.
        parts: what the reward is the weighted sum of, by name; empty if it is the task's reward alone.
    """

    outcome: Outcome
    reward: float
    answered: bool
    detail: str = ""
    parts: Mapping[str, float] = field(default_factory=dict, metadata=OPTIONAL)

    @property
    def correct(self) -> bool:
        """True if the answer is right. Rewards of functions, which `parts` has, may bring the sum below 0."""
        return self.outcome == "ok" and (self.reward > 0 or bool(self.parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepVerdict:
    """The judgement of the complete thought nodes of a chain.

    Attributes:
        wrong_node: number of the first wrong node, from 0; None if all are right.
        detail: what is wrong with it, for people.
    """

    wrong_node: int | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A problem as token ids.

    Attributes:
        token_ids: [T] int32.
        question: the question, for models with another tokenizer.
        metadata: see `Problem`.
    """

    prompt_id: str
    token_ids: Int32Array
    answer: str
    question: Question = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def problem(self) -> Problem:
        """The problem as verifiers see it."""
        return Problem(problem_id=self.prompt_id, question=self.question, answer=self.answer, metadata=self.metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """The weight version that sampled the tokens from `start` on.

    Attributes:
        start: index into token_ids.
        version: the weight version.
        attempt: number of restarts of the learner, within the command, before it made these weights. After a rollback
            to a checkpoint a version is made a second time, and only this number distinguishes the two. Tree files do
            not store it.
    """

    start: int
    version: int
    attempt: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherTokens:
    """Log-probabilities of a teacher for tokens of a sequence, at temperature 1.

    Attributes:
        mask: [T] bool, True on tokens that the teacher scored.
        ids: [T, K] int32, tokens that could stand there: the most probable ones, or the token itself if K is 1.
        logprobs: [T, K] float32, nats, of these tokens given all tokens before; valid where the mask is True.
    """

    mask: BoolArray
    ids: Int32Array
    logprobs: Float32Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A thought node inside a searched trajectory.

    Attributes:
        node: number of the node in the tree. Trajectories of a group that share a number share the node and all nodes
            before it.
        parent: number of the parent node; 0 is the prompt.
        start: the tokens of the node are token_ids[start:stop].
        stop: see `start`.
        type: name of the node type.
        samples: how often this node was drawn from its parent; duplicates are merged.
        visits: chains that ended below the node during the search.
        value: mean reward of these chains; None without visits.
        backtrack: whether the node was added because the verifier had judged an answer below its parent as wrong.
    """

    node: int
    parent: int
    start: int
    stop: int
    type: str
    samples: int
    visits: int
    value: float | None
    backtrack: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """A prompt and all tokens generated after it.

    Attributes:
        token_ids: [T] int32, the prompt first.
        loss_mask: [T] bool, True only on tokens that the policy itself chose.
        behavior_logprobs: [T] float32, in nats; 0 where the mask is False.
        versions: spans of weight versions over the generated tokens, by ascending start.
        reward: the reward of the verifier; meaningless if the outcome is "error" or "timeout".
        detail: the verifier's reason, for example why it failed.
        parts: see `Verdict`.
        steps: thought nodes in order, for a trajectory from a tree.
        teacher: scores of a teacher; None without one.
        turns: turns of the policy in an episode with an environment; 0 without an environment.
        environment_failed: whether the environment raised or ran out of time.
    """

    token_ids: Int32Array
    loss_mask: BoolArray
    behavior_logprobs: Float32Array
    versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    reward: float
    outcome: Outcome
    answered: bool
    detail: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    teacher: TeacherTokens | None = None
    turns: int = 0
    environment_failed: bool = False

    @property
    def completion_length(self) -> int:
        """Number of tokens that the policy chose."""
        return int(self.loss_mask.sum())

    @property
    def truncated(self) -> bool:
        """True if a bound of tokens cut the completion off. An episode whose turns are used up is whole."""
        return self.finish_reason == "length"

    @property
    def judged(self) -> bool:
        """True if the verifier reached a verdict."""
        return self.outcome in ("ok", "wrong")

    @property
    def correct(self) -> bool:
        """True if the answer is right; see `Verdict.correct`."""
        return self.outcome == "ok" and (self.reward > 0 or bool(self.parts))

    @property
    def oldest_version(self) -> int | None:
        """The oldest weight version that sampled a token; None if the policy chose no token."""
        return min((span.version for span in self.versions), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A supervised row.

    Attributes:
        token_ids: [T] int32.
        loss_mask: [T] bool, True on the completion.
        teacher: scores of a teacher; None without one.
    """

    token_ids: Int32Array
    loss_mask: BoolArray
    teacher: TeacherTokens | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """Two complete chains for one prompt; the chosen chain is better than the rejected chain.

    Attributes:
        chosen_ids: [T] int32, the prompt first, the end token last.
        prompt_length: number of tokens of the prompt.
        common: length of the longest common prefix, prompt included. Both chains have tokens after it.
        chosen_mask: [T] bool, False on the replies of an environment alone; None without one.
        chosen_visits: visits of the first node in which the chosen chain differs; None for a pair without a tree.
        chosen_reference: sum of the log-probabilities, in nats, of the tokens that the preference loss compares, under
            the reference policy; None until it is computed.
        rejected_ids, rejected_mask, rejected_visits, rejected_reference: those of the rejected chain.
    """

    chosen_ids: Int32Array
    rejected_ids: Int32Array
    prompt_length: int
    common: int
    chosen_mask: BoolArray | None = None
    rejected_mask: BoolArray | None = None
    chosen_visits: int | None = None
    rejected_visits: int | None = None
    chosen_reference: float | None = None
    rejected_reference: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPreference:
    """Two thought nodes that continue the same prefix; the chosen node has the higher value.

    Attributes:
        prefix_ids: [T] int32, the prompt and the chain before the nodes.
        chosen_ids: [T] int32, tokens of the chosen node.
        rejected_ids: [T] int32, tokens of the rejected node.
    """

    prefix_ids: Int32Array
    chosen_ids: Int32Array
    rejected_ids: Int32Array
    chosen_value: float
    rejected_value: float
    chosen_visits: int
    rejected_visits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryGroup:
    """All G trajectories of one prompt, and the other data that a search of the prompt gave.

    Attributes:
        searched: whether the trajectories are leaves of a tree instead of independent samples.
        pairs: preference pairs of whole chains.
        step_preferences: preference pairs of sibling nodes.
        demonstrations: chains to imitate.
        metrics: figures of the search by name, without "search/"; see `rlsys.run.metrics`.
    """

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    searched: bool = False
    pairs: tuple[Preference, ...] = ()
    step_preferences: tuple[StepPreference, ...] = ()
    demonstrations: tuple[Demonstration, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def oldest_version(self) -> int | None:
        """The oldest weight version that sampled a token; None if another model generated all tokens."""
        return min((span.version for trajectory in self.trajectories for span in trajectory.versions), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch:
    """The data of one training step. A term of the loss without data trains nothing.

    Attributes:
        groups: trajectory groups with their own pairs and demonstrations.
        pairs: preference pairs in addition to those of the groups.
        demonstrations: supervised rows in addition to those of the groups.
        interpolation: share of the teacher in the distribution to learn; None for that of the config.
        kept: numbers of group and trajectory of those whose `TokenValues` the driver asks for after the step.
    """

    groups: tuple[TrajectoryGroup, ...] = ()
    pairs: tuple[Preference, ...] = ()
    demonstrations: tuple[Demonstration, ...] = ()
    interpolation: float | None = None
    kept: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutFailure:
    """A rollout that produced no group. It is counted as data and never logged as a traceback.

    Attributes:
        reason: the reason, for people.
        tokens: number of tokens known to have been generated for it.
    """

    prompt: Prompt
    reason: str
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """Settings for sampling the completions of a prompt.

    Attributes:
        samples: completions of each prompt.
        temperature: 0 is greedy decoding.
        top_p: nucleus mass.
        max_tokens: maximum length of a completion.
        seed: seed of the random numbers.
        teacher: whether the teacher of the run scores the completions.
    """

    samples: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    teacher: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """The state of the driver. Together with the learner's files it makes a checkpoint.

    Attributes:
        stage: index into the stages of the config.
        step: finished training steps of this stage.
        weight_version: finished training steps of all stages.
        cursor: next prompt index of the stream.
        in_flight: indices of prompts that were issued and not trained, in order.
        counters: totals of the run so far, by name.
    """

    stage: int
    step: int
    weight_version: int
    cursor: int
    in_flight: tuple[int, ...] = ()
    counters: Mapping[str, float] = field(default_factory=dict)
