"""The self-test of `rlsys doctor`: an engine generates, a learner makes a step, and its weights are published.

    python -m rlsys.launch.self_test DEVICE FOLDER

A process of its own, because a broken installation may kill it or hang. It prints a line of JSON for every part.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.engine_build import engine_environment
from learners.settings import RankSettings, learner_environment
from rlsys.config.objective import ObjectiveConfig
from rlsys.config.schema import ActorsConfig, FromScratchConfig, LearnerConfig, OptimizerConfig
from rlsys.config.stages import StageSettings
from rlsys.errors import RlsysError
from rlsys.models.scratch import scratch_model
from rlsys.types import Demonstration, TrainingBatch

if TYPE_CHECKING:
    from actors.engine import Engine
    from learners.rank import LearnerRank

PARTS = ("learner", "engine", "publish")
LARGEST_GAP = 1e-3  # nats, in fp32; healthy machines stay below 1e-5
SCRATCH = FromScratchConfig(hidden_size=64, layers=2, heads=2, intermediate_size=128, max_positions=128)
ACTORS = ActorsConfig(max_model_len=64, max_num_seqs=8, kv_cache_gib=0.05, gpu_memory_utilization=0.2)
LEARNER = LearnerConfig(ranks=1)
ROW = np.arange(4, 24, dtype=np.int32)


def train(device: str, folder: Path, model: Path) -> tuple[str, LearnerRank]:
    """Make one training step on one row, and return what was seen."""
    from learners.rank import LearnerRank

    settings = RankSettings(
        rank=0,
        ranks=1,
        device=device,
        store=str(folder / "rendezvous"),
        seed=0,
        pad_token_id=0,
        temperature=1.0,
        max_tokens=32,
        learner=LEARNER,
        objective=ObjectiveConfig(),
    )
    rank = LearnerRank(settings)
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_updates=0)
    stage = StageSettings(stage="warm_start", steps=2, updates_per_step=1, optimizer=optimizer)
    rank.start_stage(stage, model, None, None)
    row = Demonstration(token_ids=ROW, loss_mask=np.arange(len(ROW)) >= len(ROW) // 2)
    metrics = rank.train(TrainingBatch(demonstrations=(row,)), 0, 1)
    return f"one step, loss {metrics['learner/loss']:.2f}", rank


def generate(device: str, model: Path) -> tuple[str, Engine]:
    """Generate a few completions with the initial weights, and return what was seen."""
    from actors.engine import CompletionRequest, Engine

    engine = Engine(model, ACTORS, device, end_token_ids=[])
    requests = [
        CompletionRequest(request_id=f"{n}", token_ids=ROW.tolist(), seed=n, temperature=1.0, top_p=1.0, max_tokens=16)
        for n in range(4)
    ]
    tokens = sum(len(future.result().token_ids) for future in engine.submit(requests))
    if tokens != 16 * len(requests):
        raise RlsysError(f"expected {16 * len(requests)} tokens, found {tokens}")
    return f"{tokens} tokens from {len(requests)} requests", engine


def publish(rank: LearnerRank, engine: Engine) -> str:
    """Send the weights of the step to the engine, and compare the log-probabilities of both."""
    from rlsys.transfer.object_store import BucketReceiver, ObjectStoreSender
    from rlsys.weight_types import WeightOffer

    def gap() -> float:
        (engine_logprobs,), (learner_logprobs,) = engine.prompt_logprobs([ROW]), rank.score([ROW])
        return float(np.abs(engine_logprobs - learner_logprobs).max())

    before = gap()
    sender = ObjectStoreSender(lambda data: data.copy(), bucket_bytes=100_000)
    rank.send(sender, 1, ())
    receiver = BucketReceiver("0", "0.0", lambda source, request: source.take(request), lambda data: data)
    offer: Any = WeightOffer(version=1, attempt=0, source=sender)
    engine.update_weights(1, 0, receiver.receive(offer))
    after = gap()
    if not after < LARGEST_GAP < before:
        raise RlsysError(
            f"expected actor and learner to differ by more than {LARGEST_GAP:g} nats before a publish and less after "
            f"it, found {before:.1g} and {after:.1g}; the engine computes something else than the learner"
        )
    return f"digests equal, actor against learner {before:.1g} nats before and {after:.1g} after"


def main(device: str, folder: Path) -> None:
    """Run all parts. A part that fails ends the test; standard error has its traceback."""
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # frameworks print to standard output
    # Before torch is imported: its threads are counted then, and vLLM's kernels fail if their number changes.
    os.environ.update(engine_environment(ACTORS, device) | learner_environment(LEARNER, device, 0))
    model = scratch_model(SCRATCH, [f"{n:02d}" for n in range(40)], 0, folder).path

    def report(part: str, work: Callable[[], tuple[str, Any]]) -> Any:
        started = time.monotonic()
        detail, result = work()
        print(json.dumps({"part": part, "detail": detail, "seconds": time.monotonic() - started}), file=results)
        return result

    # The learner first: vLLM takes an existing process group, DeepSpeed does not.
    rank = report("learner", lambda: train(device, folder, model))
    engine = report("engine", lambda: generate(device, model))
    report("publish", lambda: (publish(rank, engine), None))
    results.flush()
    os._exit(0)  # threads of the engine do not delay the end


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
