"""Every dataclass that crosses a process boundary. numpy and the standard library only.

Shapes: T tokens of one trajectory, G trajectories of a group, B rows, P pairs.
Log-probabilities are in nats, of the distribution that was actually sampled from.
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
FinishReason = Literal["stop", "length", "abort"]
StageName = Literal["warm_start", "search", "sft", "preference", "online"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One question of a task, as text, before any tokenizer has seen it."""

    problem_id: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a verifier says of one completion.

    reward: finite; 0.0 unless the outcome is "ok" or "wrong".
    answered: False where the completion holds no valid answer (the no-answer rate counts these).
    """

    outcome: Outcome
    reward: float
    answered: bool
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A problem as token ids. token_ids: [T] int32; question: its text, for models with another tokenizer."""

    prompt_id: str
    token_ids: Int32Array
    answer: str
    question: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Tokens from `start` (index into token_ids) on were sampled by weights `version`.

    attempt: how often the learner that made them had been started again, within the command. After a return to a
    checkpoint a version is made once more, and only this tells the two apart. No tree file holds it.
    """

    start: int
    version: int
    attempt: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A thought node inside a searched trajectory.

    node, parent: numbers in the tree; 0 is the prompt. Trajectories of one group that share a node number share the
    node and all before it.
    start, stop: its tokens are token_ids[start:stop].
    type: name of its node type.
    samples: how often this node was drawn from its parent; duplicates are merged.
    visits, value: chains that ended below it and their mean reward, as the search saw them (value None without visits).
    backtrack: put there because the verifier had found an answer below its parent wrong.
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
    """A prompt and everything generated after it.

    token_ids: [T] int32, the prompt first.
    loss_mask: [T] bool, True only on tokens the policy itself chose.
    behavior_logprobs: [T] float32, 0 where the mask is False.
    versions: spans of weight versions over the generated tokens, ascending start.
    reward: the verifier's; meaningless where outcome is "error" or "timeout".
    detail: what the verifier said of it, such as why it failed.
    steps: its thought nodes in order, for a trajectory from a tree.
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
    steps: tuple[Step, ...] = ()

    @property
    def completion_length(self) -> int:
        """Number of tokens after the prompt that the policy chose."""
        return int(self.loss_mask.sum())

    @property
    def judged(self) -> bool:
        """Whether the verifier came to a verdict."""
        return self.outcome in ("ok", "wrong")

    @property
    def oldest_version(self) -> int | None:
        """None where no token is the policy's own."""
        return min((span.version for span in self.versions), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A supervised row. token_ids: [T] int32; loss_mask: [T] bool, True on the completion."""

    token_ids: Int32Array
    loss_mask: BoolArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """Two complete chains for one prompt, of which the first is better.

    chosen_ids, rejected_ids: [T] int32 each, the prompt first, the end token last.
    prompt_length: tokens of the prompt. common: length of the longest common prefix, prompt included; both have
    tokens after it.
    chosen_visits, rejected_visits: of the first nodes in which they differ, where the pair comes from a tree.
    chosen_reference, rejected_reference: sums of the log-probabilities, under the reference policy, of the tokens that
    the preference loss compares; None until they are computed.
    """

    chosen_ids: Int32Array
    rejected_ids: Int32Array
    prompt_length: int
    common: int
    chosen_visits: int | None = None
    rejected_visits: int | None = None
    chosen_reference: float | None = None
    rejected_reference: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPreference:
    """Two continuations of one prefix by one thought node each, of which the first has the higher value.

    prefix_ids: [T] int32, the prompt and the chain before. chosen_ids, rejected_ids: the tokens of the nodes.
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
    """All trajectories of one prompt (G of them), and what else a search of it gave.

    searched: the trajectories are leaves of a tree, not independent samples.
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
        """None where no token is the policy's own, as in a tree that another model has grown."""
        return min((span.version for trajectory in self.trajectories for span in trajectory.versions), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch:
    """What one training step learns from; what is not there trains nothing.

    pairs, demonstrations: those beside the ones that the groups bring.
    """

    groups: tuple[TrajectoryGroup, ...] = ()
    pairs: tuple[Preference, ...] = ()
    demonstrations: tuple[Demonstration, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutFailure:
    """A rollout that produced no group. Data, counted; never a traceback in a log.

    tokens: generated for it all the same, as far as that is known.
    """

    prompt: Prompt
    reason: str
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How completions are drawn. max_tokens bounds the completion; greedy is temperature 0."""

    samples: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of a publish: its Hugging Face name, shape and torch dtype name."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        width = {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]
        return width * int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBucket:
    """Consecutive tensors, flattened into one byte array, with the sha256 of those bytes."""

    tensors: tuple[TensorSpec, ...]
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """What a publish of `version` consists of, in the order it is sent. attempt: as in `VersionSpan`."""

    version: int
    buckets: tuple[WeightBucket, ...]
    attempt: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tensor.name for bucket in self.buckets for tensor in bucket.tensors)

    @property
    def bytes(self) -> int:
        return sum(bucket.bytes for bucket in self.buckets)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightOffer:
    """A weight version that the learner has sent: all that an actor needs to receive it.

    Attributes:
        manifest: description of the version.
        payload: data of the transport, picklable; only its sender and receiver look into it.
    """

    manifest: WeightManifest
    payload: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightAck:
    """An actor's answer to a publish: what it now serves and the probe's log-probabilities.

    attempt: as in `VersionSpan`.
    probe_logprobs: one [T-1] float32 array a probe row, log p(token t+1 | tokens 0..t).
    """

    actor: str
    version: int
    probe_logprobs: tuple[Float32Array, ...]
    attempt: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Everything the driver must remember; with the learner's own files it is a checkpoint.

    stage: index into the config's stages; step: finished training steps of that stage;
    weight_version: finished training steps of all stages.
    cursor: next prompt index of the stream; in_flight: prompt indices issued, not trained, in order.
    """

    stage: int
    step: int
    weight_version: int
    cursor: int
    in_flight: tuple[int, ...] = ()
    counters: Mapping[str, float] = field(default_factory=dict)
