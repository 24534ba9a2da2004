"""Compare tokens/s of the learner (2 ranks under DeepSpeed) and of bare torch for the same optimizer updates.

Every side trains the same rows (demonstrations of configs/quickstart.yaml with made-up rewards) with the clipped policy
loss and the same micro-batches. It makes one optimizer update after another: forward, loss, backward, clipping, AdamW.
The learner uses `LearnerRank.train`, in one plain process per rank, without Ray. The peer is the faster of two bare
programs: one process with two threads, and two processes with one thread each. Two processes sum their gradients, which
are views of one flat buffer, with one all-reduce. The sides take turns. Equal gradient norms show that they do the same
work.

Padding does not count as tokens. The exit code is 1 if neither ZeRO 0 nor ZeRO 1 reaches the limit.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, whose actors.py would hide the package of that name

from learners.settings import RankSettings, learner_environment  # noqa: E402
from rlsys.config.files import load_config  # noqa: E402
from rlsys.config.objective import ObjectiveConfig  # noqa: E402
from rlsys.config.schema import Config  # noqa: E402
from rlsys.config.stages import StageSettings  # noqa: E402
from rlsys.data.inputs import Inputs, prepare_model  # noqa: E402
from rlsys.processes import die_with_parent, quiet_worker  # noqa: E402
from rlsys.types import Demonstration, Prompt, TrainingBatch, Trajectory, TrajectoryGroup, VersionSpan  # noqa: E402

LIMIT = 0.80
# No warm-up of the learning rate; no importance weights, because no policy sampled these tokens; no extra metrics.
OVERRIDES = (
    "train.optimizer.warmup_updates=0",
    "objective.policy.importance_cap=null",
    "objective.grad_norm_interval=0",
)
TOKENS_PER_RANK = 4096
Step = Callable[[], float]  # makes one optimizer update and returns the gradient norm before clipping


@dataclass(frozen=True, slots=True)
class Side:
    """One side of the comparison. `stage` is the ZeRO stage of the learner; None for bare torch."""

    name: str
    ranks: int
    threads: int
    stage: Any = None


LEARNERS = tuple(Side(f"learner, ZeRO {stage}, 2 ranks x 1 thread", 2, 1, stage) for stage in (0, 1, 2, 3))
PEERS = (Side("bare torch, 1 process x 2 threads", 1, 2), Side("bare torch, 2 processes x 1 thread", 2, 1))


@dataclass(frozen=True, slots=True)
class Work:
    """The data and settings that every side trains with."""

    model: Path
    folder: Path
    groups: list[TrajectoryGroup]
    pad_token_id: int
    config: Config

    @property
    def tokens(self) -> int:
        return sum(len(trajectory.token_ids) for group in self.groups for trajectory in group.trajectories)


def learner_step(work: Work, side: Side, rank: int) -> Step:
    """Return the update of our learner."""
    from learners.rank import LearnerRank

    settings = RankSettings(
        rank=rank,
        ranks=side.ranks,
        device="cpu",
        store=str(work.folder / f"store-{side.stage}"),
        seed=0,
        pad_token_id=work.pad_token_id,
        temperature=work.config.sampling.temperature,
        max_tokens=work.config.sampling.max_tokens,
        learner=work.config.learner.model_copy(update={"zero_stage": side.stage}),
        objective=work.config.objective,
    )
    learner, batch = LearnerRank(settings), TrainingBatch(groups=tuple(work.groups))
    stage = StageSettings(stage="online", steps=10**6, updates_per_step=1, optimizer=work.config.train.optimizer)
    learner.start_stage(stage, work.model, None, None)
    steps = itertools.count()

    def step() -> float:
        number = next(steps)
        return learner.train(batch, number, number + 1)["learner/grad_norm"]

    return step


def bare_step(work: Work, side: Side, rank: int) -> Step:
    """Return the update of the peer, which uses only torch and the model."""
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    from learners.samples.batching import collate
    from learners.samples.planning import plan_micro_batches

    torch.set_num_threads(side.threads)
    if side.ranks > 1:
        store = f"file://{work.folder / 'store-bare'}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=side.ranks)
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32).train()
    parameters = list(model.parameters())
    options = work.config.train.optimizer
    adam = torch.optim.AdamW(
        parameters, options.learning_rate, (options.beta1, options.beta2), options.eps, options.weight_decay
    )
    gradients = torch.zeros(sum(parameter.numel() for parameter in parameters))
    parts = gradients.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)
    items, loss_tokens = policy_items(work.groups, work.config.objective)
    lengths = [item.length for item in items]
    budget = work.config.learner.micro_batch_tokens
    shares = plan_micro_batches(lengths, ranks=side.ranks, budget_tokens=budget)[rank]

    def step() -> float:
        gradients.zero_()
        for ids in shares:
            batch = collate([items[i] for i in ids], work.pad_token_id)
            (plain_policy_loss(model, batch, work.config.objective) / loss_tokens).backward()
        if side.ranks > 1:
            dist.all_reduce(gradients)
        norm = torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
        adam.step()
        return float(norm)

    return step


def policy_items(groups: list[TrajectoryGroup], objective: ObjectiveConfig) -> tuple[list[Any], int]:
    """Return the rows of groups, and the number of their tokens with a loss."""
    from learners.samples.policy import policy_samples
    from learners.samples.types import PackItem, count_targets

    no_scorer: Any = None  # without KL and critic, no other model is scored
    by_group = policy_samples(groups, objective, max_tokens=1, kl_weight=0.0, scorer=no_scorer)
    items = [PackItem(samples=(sample,)) for samples in by_group for sample in samples]
    return items, sum(count_targets(sample.policy_mask) for item in items for sample in item.samples)


def plain_policy_loss(model: Any, batch: Any, objective: ObjectiveConfig) -> Any:
    """Return the sum of the clipped policy loss over the targets of rows that share nothing, from their logits."""
    import torch

    low, high = 1 - objective.policy.clip_low, 1 + objective.policy.clip_high
    length = batch.input_ids.shape[1]
    rows, places = batch.targets // length, batch.targets % length
    first = int(places.min())
    logits = model(input_ids=batch.input_ids, use_cache=False, logits_to_keep=length - first).logits
    logprobs = logits[rows, places - first].log_softmax(-1).gather(-1, batch.target_ids[:, None])[:, 0]
    ratio = (logprobs - logprobs.detach()).exp()
    advantages = batch.policy.advantages
    return -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages).sum()


def serve(pipe: Any, work: Work, side: Side, rank: int, log: Path) -> None:
    """Run a process of a side. It makes the received number of updates and answers (start, end, gradient norms)."""
    quiet_worker(str(log))
    die_with_parent()
    settings = work.config.learner.model_copy(update={"ranks": side.ranks, "threads": side.threads})
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.update(learner_environment(settings, "cpu", rank))  # before torch is imported
    step = (bare_step if side.stage is None else learner_step)(work, side, rank)
    while updates := pipe.recv():
        started = time.perf_counter()
        norms = [step() for _ in range(updates)]
        pipe.send((started, time.perf_counter(), norms))


class Running:
    """The processes of a side."""

    def __init__(self, work: Work, side: Side) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.logs = [work.folder / f"{side.name} rank {rank}.log" for rank in range(side.ranks)]
        self.pipes = []
        for rank, log in enumerate(self.logs):
            pipe, theirs = spawn.Pipe()
            spawn.Process(target=serve, args=(theirs, work, side, rank, log), daemon=True).start()
            theirs.close()
            self.pipes.append(pipe)

    def round(self, updates: int) -> tuple[float, float]:
        """Return the seconds from the first start to the last end, and the first gradient norm."""
        try:
            for pipe in self.pipes:
                pipe.send(updates)
            starts, ends, norms = zip(*(pipe.recv() for pipe in self.pipes), strict=True)
        except (EOFError, OSError):
            raise SystemExit("\n".join(log.read_text()[-2000:] for log in self.logs)) from None
        return max(ends) - min(starts), norms[0][0]


def make_work(folder: Path, groups: int) -> Work:
    """Make groups of the quickstart's size from its demonstrations, with random rewards."""
    config = load_config(ROOT / "configs" / "quickstart.yaml", OVERRIDES)
    model = prepare_model(config, folder)
    inputs = Inputs(config, model)
    size, rng = config.train.group_size, np.random.default_rng(0)
    per_step = config.warm_start.rows_per_step
    steps = range(-(-groups * size // per_step))
    rows = [row for step in steps for row in inputs.data.batch("warm_start", step).demonstrations]
    made = [_group(rows[size * i : size * (i + 1)], rng) for i in range(groups)]
    return Work(model.path, folder, made, inputs.pad_token_id, config)


def _group(rows: list[Demonstration], rng: np.random.Generator) -> TrajectoryGroup:
    trajectories = tuple(
        Trajectory(
            token_ids=row.token_ids,
            loss_mask=row.loss_mask,
            behavior_logprobs=np.zeros(len(row.token_ids), dtype=np.float32),
            versions=(VersionSpan(start=int(row.loss_mask.argmax()), version=0),),
            finish_reason="stop",
            reward=float(rng.random() < 0.5),
            outcome="ok",
            answered=True,
        )
        for row in rows
    )
    prompt = Prompt(prompt_id="", token_ids=rows[0].token_ids[~rows[0].loss_mask], answer="")
    return TrajectoryGroup(prompt=prompt, trajectories=trajectories)


def measure(work: Work, rounds: int, updates: int) -> dict[Side, list[float]]:
    """Return the seconds of every round of every side. A warm-up round comes first."""
    running = {side: Running(work, side) for side in LEARNERS + PEERS}
    norms = {side: processes.round(1)[1] for side, processes in running.items()}
    if not np.allclose(list(norms.values()), norms[PEERS[0]], rtol=1e-3):
        raise SystemExit(f"the sides do not compute the same gradients: {norms}")
    for processes in running.values():
        processes.round(updates)
    seconds: dict[Side, list[float]] = {side: [] for side in running}
    for _ in range(rounds):
        for side, processes in running.items():
            seconds[side].append(processes.round(updates)[0])
    return seconds


def report(seconds: dict[Side, list[float]], tokens: int) -> bool:
    """Print the table, and return whether the limit is met. `tokens` is the number of tokens of a round."""
    peer = min(PEERS, key=lambda side: statistics.median(seconds[side]))
    print(f"{'':38}{'tokens/s: min':>14}{'median':>9}{'max':>9}{'ratio: median':>15}{'min':>7}{'max':>7}")
    medians = {}
    for side, found in seconds.items():
        rates = [tokens / value for value in found]
        ratios = [theirs / ours for theirs, ours in zip(seconds[peer], found, strict=True)]
        medians[side] = statistics.median(ratios)
        figures = f"{min(rates):>14,.0f}{statistics.median(rates):>9,.0f}{max(rates):>9,.0f}"
        print(f"{side.name:38}{figures}{medians[side]:>15.3f}{min(ratios):>7.3f}{max(ratios):>7.3f}")
    best = max(medians[side] for side in LEARNERS[:2])
    print(f"ratio to '{peer.name}', round by round; ZeRO 0 or 1: {best:.3f}, limit {LIMIT:.2f}")
    return best >= LIMIT


def main() -> int:
    parser = argparse.ArgumentParser(description="Learner tokens/s against bare torch.")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of every side")
    parser.add_argument("--updates", type=int, default=5, help="optimizer updates of one round")
    parser.add_argument("--groups", type=int, default=32, help="groups of one update")
    parser.add_argument("--small", action="store_true", help="one round of one small update, without a limit")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.rounds, arguments.updates, arguments.groups = 1, 1, 4
    with tempfile.TemporaryDirectory() as folder:
        work = make_work(Path(folder), arguments.groups)
        print(f"{work.tokens // 2:,} real tokens per rank and update, {arguments.updates} updates per round")
        if work.tokens // 2 < TOKENS_PER_RANK and not arguments.small:
            raise SystemExit(f"expected at least {TOKENS_PER_RANK} tokens per rank and update: raise --groups")
        seconds = measure(work, arguments.rounds, arguments.updates)
    met = report(seconds, work.tokens * arguments.updates)
    return 0 if met or arguments.small else 1


if __name__ == "__main__":
    sys.exit(main())
