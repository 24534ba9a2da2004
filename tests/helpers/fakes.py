"""Fakes of the protocols in rlsys.interfaces. They record the order of calls and compute nothing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rlsys.control.rollout_metrics import SUMMED
from rlsys.interfaces import EngineStats, TokenValues
from rlsys.sequences import teacher_tokens
from rlsys.types import (
    Demonstration,
    Float32Array,
    Int32Array,
    Outcome,
    Preference,
    Problem,
    Prompt,
    Question,
    RolloutFailure,
    SamplingSettings,
    Split,
    Step,
    TrainingBatch,
    Trajectory,
    TrajectoryGroup,
    Verdict,
    VersionSpan,
)
from rlsys.weight_types import WeightAck, WeightBucket, WeightManifest, WeightOffer

SAMPLING = SamplingSettings(samples=2, temperature=1.0, top_p=1.0, max_tokens=4, seed=0)
PROBE = (np.arange(4, dtype=np.int32), np.arange(3, dtype=np.int32))


def prompt(name: str, length: int = 3) -> Prompt:
    return Prompt(prompt_id=name, token_ids=np.arange(length, dtype=np.int32), answer=name)


def trajectory(
    version: int = 0, reward: float = 1.0, outcome: Outcome = "ok", answered: bool = True, length: int = 2
) -> Trajectory:
    """Return a trajectory of three prompt tokens and `length` sampled tokens."""
    total = 3 + length
    return Trajectory(
        token_ids=np.arange(total, dtype=np.int32),
        loss_mask=np.arange(total) >= 3,
        behavior_logprobs=np.zeros(total, dtype=np.float32),
        versions=(VersionSpan(start=3, version=version),),
        finish_reason="stop",
        reward=reward,
        outcome=outcome,
        answered=answered,
    )


def group(of: Prompt, version: int = 0, rewards: Sequence[float] = (1.0, 0.0)) -> TrajectoryGroup:
    trajectories = tuple(trajectory(version, reward, "ok" if reward else "wrong") for reward in rewards)
    return TrajectoryGroup(prompt=of, trajectories=trajectories)


def searched_group(
    of: Prompt, version: int = 0, rewards: Sequence[float] = (1.0, 0.0), **changes: Any
) -> TrajectoryGroup:
    """Return a tree of one thought of one token, with an answer of one token for every reward.

    Args:
        changes: metrics of the search that replace those that follow from the rewards.
    """
    trajectories = []
    for number, reward in enumerate(rewards, start=2):
        sampled = trajectory(version, reward, "ok" if reward else "wrong")
        nodes = ((1, 0, 3, 4, "thinking"), (number, 1, 4, 5, "answer"))
        steps = tuple(
            Step(node=node, parent=parent, start=start, stop=stop, type=kind, samples=1, visits=1, value=reward)
            for node, parent, start, stop, kind in nodes
        )
        trajectories.append(replace(sampled, steps=steps))
    metrics = dict.fromkeys((*SUMMED, "solved", "reward_sum"), 0.0)
    metrics |= {"scored": float(len(rewards)), "reward_sum": sum(rewards), "tokens": 10.0}
    metrics |= {"correct": float(sum(reward > 0 for reward in rewards)), "solved": float(any(rewards))}
    return TrajectoryGroup(prompt=of, trajectories=tuple(trajectories), searched=True, metrics={**metrics, **changes})


class NumberTask:
    """A task whose questions have 3 letters, or i + 1 letters for problem i."""

    one_answer = True

    def __init__(self, train: int | None, held_out: int | None = 4, same_length: bool = True) -> None:
        self._sizes: dict[Split, int | None] = {"train": train, "held_out": held_out}
        self._same_length = same_length

    def size(self, split: Split) -> int | None:
        return self._sizes[split]

    def problem(self, split: Split, index: int) -> Problem:
        question = "x" * (3 if self._same_length else index + 1)
        return Problem(problem_id=f"{split}-{index}", question=question, answer=str(index))

    def verify(self, problem: Problem, completion: str, finished: bool = True) -> Verdict:
        raise NotImplementedError

    def check_steps(self, question: Question, completion: str) -> None:
        """It has no rules for steps."""

    def demonstration(self, index: int, rng: random.Random) -> tuple[Problem, str] | None:
        return self.problem("train", index), f"{rng.random():.6f}"

    def digest(self) -> str:
        return ""

    def notes(self) -> tuple[str, ...]:
        return ()

    def vocabulary(self) -> tuple[str, ...]:
        return ()


class FakePool:
    """Actors that serve the version they got last.

    Args:
        calls: where every call is recorded, in order.
        failing: ids of prompts whose rollout fails.
        hold: where set, training dispatches wait for this event.
    """

    def __init__(self, count: int, calls: list[Any], failing: Sequence[str] = ()) -> None:
        self.count = count
        self.restarts = 0
        self.calls = calls
        self.failing = set(failing)
        self.versions = [0] * count
        self.error: BaseException | None = None
        self.hold: asyncio.Event | None = None
        self.answer: dict[int, list[Float32Array]] = {}
        self.unsolved: set[str] = set()  # ids of prompts whose samples are all wrong

    async def score_rows(self, rows: Sequence[Demonstration], tokens: int | None) -> list[Demonstration]:
        """Return rows whose own tokens have a log-probability of -1 under the teacher."""
        self.calls.append(("score_rows", len(rows)))
        scores = [
            teacher_tokens(row.loss_mask, row.token_ids[1:, None], -np.ones((len(row.token_ids) - 1, 1), np.float32))
            for row in rows
        ]
        return [replace(row, teacher=score) for row, score in zip(rows, scores, strict=True)]

    async def generate(
        self, actor: int, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Sequence[TrajectoryGroup | RolloutFailure]:
        self.calls.append(("generate", actor, tuple(p.prompt_id for p in prompts)))
        version = self.versions[actor]
        await self._work(prompts)
        return [
            RolloutFailure(prompt=p, reason="scripted")
            if p.prompt_id in self.failing
            else group(p, version, [float(p.prompt_id not in self.unsolved), 0.0, 0.0, 0.0][: settings.samples])
            for p in prompts
        ]

    async def search(self, actor: int, prompt: Prompt) -> TrajectoryGroup | RolloutFailure:
        self.calls.append(("search", actor, (prompt.prompt_id,)))
        version = self.versions[actor]
        await self._work([prompt])
        if prompt.prompt_id in self.failing:
            return RolloutFailure(prompt=prompt, reason="scripted")
        return searched_group(prompt, version)

    async def _work(self, prompts: Sequence[Prompt]) -> None:
        await asyncio.sleep(0)
        if prompts and prompts[0].prompt_id.startswith("train"):
            if self.error:
                raise self.error
            if self.hold:
                await self.hold.wait()

    async def reset_engine_stats(self) -> None:
        await self.engine_stats()

    async def engine_stats(self) -> Sequence[EngineStats]:
        """Return the same stats after any time: every engine worked one second of four, for 5 tokens."""
        return [
            EngineStats(
                model="policy",
                engine=engine,
                busy_s=1.0,
                wall_s=4.0,
                generated_tokens=5,
                prompt_tokens=10,
                cached_tokens=6,
                in_flight_mean=2.0,
            )
            for engine in range(self.count)
        ]

    async def probe(self, actor: int, rows: Sequence[Int32Array]) -> Sequence[Float32Array]:
        self.calls.append(("probe", actor))
        return self.answer.get(actor, logprobs(rows))

    async def publish(self, publication: Any) -> None:
        publication.begin([f"{actor}.0" for actor in range(self.count)])
        updates = [self.update_weights(actor, publication.offer, publication.probe) for actor in range(self.count)]
        acks = await asyncio.gather(*updates)
        await publication.sent()
        for ack in acks:
            await publication.check(ack)

    async def update_weights(self, actor: int, offer: WeightOffer, probe: Sequence[Int32Array]) -> WeightAck:
        self.calls.append(("update", actor, offer.version))
        await asyncio.sleep(0)
        self.versions[actor] = offer.version
        scores = tuple(self.answer.get(actor, logprobs(probe)))
        return WeightAck(actor=str(actor), version=offer.version, attempt=offer.attempt, probe_logprobs=scores)


class FakeLearner:
    """A learner that trains nothing. `save` writes the version of the last call, which identifies the checkpoint.

    Attributes:
        batches: step and batch of every call.
        trained: prompt ids of the groups of every online step.
        kinds: which groups of every online step were searched.
    """

    restarts = 0
    shares_device = False

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls
        self.batches: list[tuple[int, TrainingBatch]] = []
        self.trained: list[list[str]] = []
        self.kinds: list[list[bool]] = []
        self.version = 0
        self.on_train: Any = lambda version: None

    async def start_stage(self, stage: str, policy: Path, resume: Path | None, reference: Path | None) -> None:
        self.calls.append(("start_stage", stage, policy, resume, reference))

    async def train(self, batch: TrainingBatch, step: int, version: int) -> dict[str, float]:
        self.calls.append(("train", version))
        self.batches.append((step, batch))
        if batch.groups:
            self.trained.append([each.prompt.prompt_id for each in batch.groups])
            self.kinds.append([each.searched for each in batch.groups])
        self.version = version
        self.on_train(version)
        return {"learner/tokens": 8.0}

    async def token_values(self) -> list[TokenValues]:
        """Return the version as the advantage, and as the gap a hundredth of it."""
        _, batch = self.batches[-1]
        sizes = [len(batch.groups[group].trajectories[number].token_ids) for group, number in batch.kept]
        return [
            TokenValues(
                advantages=np.full(size, self.version, np.float32), gaps=np.full(size, self.version / 100, np.float32)
            )
            for size in sizes
        ]

    async def score_pairs(self, pairs: Sequence[Preference]) -> list[tuple[float, float]]:
        """Return the negative sums of the token ids."""
        self.calls.append(("score", len(pairs)))
        return [(-float(pair.chosen_ids.sum()), -float(pair.rejected_ids.sum())) for pair in pairs]

    async def score(self, probe: Sequence[Int32Array]) -> Sequence[Float32Array]:
        self.calls.append(("score_probe", len(probe)))
        return logprobs(probe)

    def offer(self, version: int) -> WeightOffer:
        return WeightOffer(version=version, attempt=self.restarts, source=None)

    async def send(self, version: int, members: Sequence[str]) -> WeightManifest:
        self.calls.append(("send", version))
        bucket = WeightBucket(tensors=(), digest="", bytes=16)
        return WeightManifest(version=version, attempt=self.restarts, buckets=(bucket,))

    async def save(self, folder: Path) -> None:
        self.calls.append(("save", self.version))
        for name in ("policy/model.safetensors", "learner/exp_avg.safetensors"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(str(self.version))


def logprobs(rows: Sequence[Int32Array]) -> list[Float32Array]:
    return [np.full(max(len(row) - 1, 0), -1.0, dtype=np.float32) for row in rows]
