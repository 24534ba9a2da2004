"""Learners without Ray: all ranks of a learner run the jobs of its JSON file one after another.

Usage: learner_child.py RANKS JOBS [RANKS JOBS]... [then RANKS JOBS...]. Learners work at the same time, but for those
after `then`, which follow. A job says how the models are partitioned,
where they start, which training steps they make, where the result is saved, and which model at the end meets gradients
and losses that are not finite.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from learners.settings import RankSettings, learner_environment
from rlsys.config.objective import ObjectiveConfig
from rlsys.config.schema import LearnerConfig, LoraConfig, OptimizerConfig
from rlsys.config.stages import StageSettings
from rlsys.errors import NonFiniteLossError
from rlsys.types import Demonstration, Preference, Prompt, TrainingBatch, Trajectory, TrajectoryGroup, VersionSpan

PROMPT = 10
TEMPERATURE = 0.8
STEPS = 50
KEPT = ((2, 1), (0, 0), (0, 3), (1, 2))
OBJECTIVE: dict[str, Any] = {
    "kl": {"weight": 0.01},
    "preference": {"weight": 0.5, "beta": 0.1, "label_smoothing": 0.1, "source": "file"},
    "sft": {"weight": 0.7, "source": "chosen"},
    "grad_norm_interval": 1,
}
CRITIC: dict[str, Any] = {"policy": {"estimator": "gae"}, "value": {"weight": 0.5}}


def rows(rng: np.random.Generator, count: int) -> list[Demonstration]:
    lengths = rng.integers(20, 60, count)
    return [
        Demonstration(token_ids=rng.integers(3, 60, n).astype(np.int32), loss_mask=np.arange(n) >= PROMPT)
        for n in lengths
    ]


def groups(rng: np.random.Generator, count: int, size: int) -> list[TrajectoryGroup]:
    return [_group(rng, size) for _ in range(count)]


def _group(rng: np.random.Generator, size: int) -> TrajectoryGroup:
    trajectories = tuple(
        Trajectory(
            token_ids=row.token_ids,
            loss_mask=row.loss_mask,
            behavior_logprobs=np.where(row.loss_mask, -4.0, 0.0).astype(np.float32),
            versions=(VersionSpan(start=PROMPT, version=0),),
            finish_reason="stop",
            reward=float(number % 2),
            outcome="ok",
            answered=True,
        )
        for number, row in enumerate(rows(rng, size))
    )
    prompt = Prompt(prompt_id="p", token_ids=trajectories[0].token_ids[:PROMPT], answer="")
    return TrajectoryGroup(prompt=prompt, trajectories=trajectories)


def pairs(rng: np.random.Generator, count: int) -> list[Preference]:
    """Return pairs with a common prefix, and scores of a made-up reference policy."""
    found = []
    for _ in range(count):
        common = rng.integers(3, 60, PROMPT + 4)
        chosen, rejected = (np.concatenate([common, rng.integers(3, 60, rng.integers(5, 40))]) for _ in range(2))
        chosen[len(common)], rejected[len(common)] = 3, 4
        found.append(
            Preference(
                chosen_ids=chosen.astype(np.int32),
                rejected_ids=rejected.astype(np.int32),
                prompt_length=PROMPT,
                common=len(common),
                chosen_reference=-4.0 * (len(chosen) - len(common)),
                rejected_reference=-4.1 * (len(rejected) - len(common)),
            )
        )
    return found


def batch(step: int) -> TrainingBatch:
    """Return data for every term, as a function of the step."""
    rng = np.random.default_rng(step)
    return TrainingBatch(
        groups=tuple(groups(rng, 3, 4)),
        demonstrations=tuple(rows(rng, 5)),
        pairs=tuple(pairs(rng, 5)),
        kept=KEPT,
    )


def train(learner: Any, job: dict[str, Any]) -> None:
    """Steps first..last-1. `save`: folders by number of finished steps."""
    figures: dict[str, float] = {}
    for step in range(job["first"], job["last"]):
        figures |= learner.train(batch(step), step, step + 1)
        folder = job["save"].get(str(step + 1))
        if folder:
            save(learner, Path(folder), figures)


def spoil(learner: Any, job: dict[str, Any]) -> None:
    """Gradients of a model that are infinite on one rank, then a loss that is NaN there. All ranks must notice."""
    model = getattr(learner, job["spoil"])
    step, first = job["last"], learner.settings.rank == 0
    if first:
        # In a parameter, after the learner has checked it: only the norm shows it.
        hook = next(trained_layer(model.module).parameters()).register_hook(lambda gradient: gradient * math.inf)
    refused(learner, batch(step), step, "gradient norm")
    if first:
        hook.remove()
    # The policy is updated after the critic. Neither may have been updated.
    for name in ("critic", "policy"):
        if getattr(learner, name) is not None:
            if first:
                hook = trained_layer(getattr(learner, name).module).register_forward_hook(infinite)
            refused(learner, batch(step), step, f"gradient of the {name} is not finite on rank 0")
            if first:
                hook.remove()
    pair = replace(pairs(np.random.default_rng(0), 1)[0], chosen_reference=math.nan)
    refused(learner, TrainingBatch(pairs=(pair,)), step, "joint loss is nan on rank")
    save(learner, Path(job["spoiled"]), {})


def trained_layer(module: Any) -> Any:
    """Return the first layer with parameters that are trained: the embedding, or a factor of an adapter."""
    layers = (layer for layer in module.modules() if next(layer.parameters(recurse=False), None) is not None)
    return next(layer for layer in layers if next(layer.parameters(recurse=False)).requires_grad)


def infinite(module: Any, inputs: Any, embedded: Any) -> None:
    """Make the gradient of the output of a layer infinite."""
    if embedded.requires_grad:
        embedded.register_hook(lambda gradient: gradient * math.inf)


def refused(learner: Any, spoiled: TrainingBatch, step: int, message: str) -> None:
    models = [model for model in (learner.policy, learner.critic) if model is not None]
    updates = [model.updates for model in models]
    with pytest.raises(NonFiniteLossError, match=message):
        learner.train(spoiled, step, step + 1)
    assert [model.updates for model in models] == updates


def save(learner: Any, folder: Path, figures: dict[str, float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    learner.save(folder)
    values = [each and (numbers(each.advantages), numbers(each.gaps)) for each in learner.token_values()]
    (folder / f"values.{learner.settings.rank}").write_text(json.dumps(values))
    if learner.settings.rank == 0:
        (folder / "figures.json").write_text(json.dumps(figures))


def numbers(array: np.ndarray | None) -> list[float | None]:
    return [None if math.isnan(value) else float(value) for value in ([] if array is None else array)]


def token_values(folder: Path) -> list[np.ndarray]:
    """Return advantages and gaps of every kept trajectory, [2, T], from the ranks that have them."""
    by_rank = [json.loads(path.read_text()) for path in sorted(folder.glob("values.*"))]
    answers = [[values for values in each if values is not None] for each in zip(*by_rank, strict=True)]
    assert all(values == each[0] for each in answers for values in each), "ranks that share a row agree"
    return [np.array(each[0], dtype=np.float64) for each in answers]


def digests(checkpoint: Path) -> dict[str, str]:
    return {
        str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(checkpoint.rglob("*"))
        if path.suffix in (".safetensors", ".json") and path.name != "figures.json"
    }


def begin(learner: Any, job: dict[str, Any]) -> None:
    """Build the models of a job."""
    from learners.forward import ForwardPasses

    # Small micro-batches: several of them, unequal in size, and one rank gets a padding one.
    config = LearnerConfig(**{"ranks": learner.settings.ranks, "micro_batch_tokens": 256, **job["learner"]})
    objective = ObjectiveConfig(**{**OBJECTIVE, **job.get("objective", {})})
    lora = LoraConfig(**job["lora"]) if "lora" in job else None
    learner.settings = replace(
        learner.settings, learner=config, objective=objective, lora=lora, base=Path(job["model"])
    )
    learner.forward = ForwardPasses(learner.settings)
    resume = Path(job["resume"]) if job.get("resume") else None
    start = resume / "policy" if resume else Path(job.get("policy", job["model"]))
    optimizer = OptimizerConfig(
        **{"learning_rate": 1e-3, "warmup_updates": 2, "schedule": "linear", **job.get("optimizer", {})}
    )
    stage = StageSettings(
        stage="online",
        steps=STEPS,
        updates_per_step=job.get("updates", 2),
        optimizer=optimizer,
        critic=optimizer if objective.value.used else None,
    )
    learner.start_stage(stage, start, resume, Path(job.get("reference", job["model"])))


def run(learner: Any, job: dict[str, Any]) -> None:
    earlier = weakref.ref(learner.policy.module) if learner.policy is not None else lambda: None
    begin(learner, job)
    assert earlier() is None, "the model of the earlier stage is still in memory"
    train(learner, job)
    if "spoil" in job:
        learner.stage = replace(learner.stage, updates_per_step=1)
        spoil(learner, job)


def join(rank: int, ranks: int, store: Path) -> Any:
    """Run this rank of a learner together with the others."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.update(learner_environment(LearnerConfig(ranks=ranks), "cpu", rank))
    from learners.rank import LearnerRank

    settings = RankSettings(
        rank=rank,
        ranks=ranks,
        device="cpu",
        store=str(store),
        seed=0,
        pad_token_id=0,
        temperature=TEMPERATURE,
        max_tokens=60,
        learner=LearnerConfig(ranks=ranks),
        objective=ObjectiveConfig(**OBJECTIVE),
    )
    return LearnerRank(settings)


def fork_ranks(main: Callable[[int, int, Path], None]) -> None:
    """Run main(rank, ranks, jobs) for every rank of every learner, each in a fork; exit with 1 if a rank failed.

    The forks share what takes seconds to import, and do not search it for garbage.
    """
    os.environ.update(learner_environment(LearnerConfig(), "cpu", 0))

    import learners.rank  # noqa: F401

    gc.freeze()
    for group in " ".join(sys.argv[1:]).split(" then "):
        words, forks = group.split(), []
        for ranks, jobs in zip(map(int, words[::2]), map(Path, words[1::2]), strict=True):
            for rank in range(ranks):
                if (child := os.fork()) == 0:
                    with jobs.with_suffix(f".{rank}.errors").open("w") as errors:
                        os.dup2(errors.fileno(), sys.stderr.fileno())
                    main(rank, ranks, jobs)
                    sys.exit()
                forks.append(child)
        codes = [os.waitpid(child, 0)[1] for child in forks]  # of all, also after one has failed
        if any(codes):
            sys.exit(1)


def main(rank: int, ranks: int, jobs_file: Path) -> None:
    learner = join(rank, ranks, jobs_file.with_suffix(".store"))
    for job in json.loads(jobs_file.read_text()):
        run(learner, job)


if __name__ == "__main__":
    fork_ranks(main)
