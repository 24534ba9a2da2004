"""A bf16 engine and a bf16 learner of one process under the real bus: write as JSON which publishes were accepted.

Usage: bf16_child.py MODEL_FOLDER STALE. The last publish leaves out tensor number STALE of the list below. The learner
keeps fp32 master weights, as DeepSpeed does.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from local_weights import LocalLearner
from transformers import AutoModelForCausalLM

from actors.engine import Engine
from actors.engine_build import engine_environment
from rlsys import fault_injection as faults
from rlsys.config.schema import ActorsConfig, WeightSyncConfig
from rlsys.control.weights import WeightBus
from rlsys.errors import EngineError, WeightSyncError
from rlsys.weight_types import WeightAck, WeightOffer

CONFIG = ActorsConfig(max_model_len=128, max_num_seqs=16, kv_cache_gib=0.05, dtype="bf16")
PUBLISHES, ROWS = 50, 8
# Small steps, as of RL on a large model, then steps that change the model beyond recognition.
RATES = [1e-6] * 20 + [1e-4] * 15 + [1e-3] * 15
STALE = ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight")


class Bf16Learner(LocalLearner):
    """Learner that trains on repeated rows."""

    def __init__(self, folder: Path, draw: np.random.Generator) -> None:
        super().__init__(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
        self.master = {name: p.detach().float().requires_grad_() for name, p in self.model.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.master.values(), betas=(0.9, 0.99))
        rows = np.tile(draw.integers(3, self.model.config.vocab_size, size=(16, 8)), (1, 5))
        self.rows = torch.from_numpy(rows.astype(np.int64))

    def train(self, rate: float) -> None:
        self.model.zero_grad()
        self.model(self.rows, labels=self.rows).loss.backward()
        self.optimizer.param_groups[0]["lr"] = rate
        for name, parameter in self.model.named_parameters():
            self.master[name].grad = parameter.grad.float()
        self.optimizer.step()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.master[name])


class LocalPool:
    """RolloutPool of one engine in this process."""

    count = 1

    def __init__(self, engine: Engine, learner: LocalLearner) -> None:
        self.engine, self.learner = engine, learner

    async def probe(self, _actor: int, rows: Sequence[Any]) -> list[Any]:
        return await asyncio.to_thread(self.engine.prompt_logprobs, rows)

    async def publish(self, publication: Any) -> None:
        publication.begin(["0.0"])
        await publication.check(await self.load(publication.offer, publication.probe))

    async def load(self, offer: WeightOffer, rows: Sequence[Any]) -> WeightAck:
        arriving = self.learner.receive(offer)
        await asyncio.to_thread(self.engine.update_weights, offer.version, offer.attempt, arriving)
        return WeightAck(actor="0", version=offer.version, probe_logprobs=tuple(await self.probe(0, rows)))


def stale_publish(bus: WeightBus, learner: Bf16Learner, name: str) -> str:
    """Return the error of a publish after a small step, of which a layer of the engine never gets its tensor."""
    learner.train(RATES[0])
    faults._faults = faults.parse(f"publish.drop:{name}")
    try:
        asyncio.run(bus.publish(PUBLISHES + 1))
    except (WeightSyncError, EngineError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def main(folder: Path, stale: int) -> None:
    torch.set_num_threads(1)
    draw = np.random.default_rng(0)
    learner = Bf16Learner(folder, draw)
    engine = Engine(folder, CONFIG, "cpu", end_token_ids=[1])
    probe = [draw.integers(3, learner.model.config.vocab_size, size=40).astype(np.int32) for _ in range(ROWS)]
    pool: Any = LocalPool(engine, learner)
    bus = WeightBus(learner, pool, WeightSyncConfig(), "bf16", probe)  # type: ignore[arg-type]
    result: dict[str, Any] = {"fresh_gap": asyncio.run(bus.calibrate()), "gaps": [], "refused": []}
    for version, rate in enumerate(RATES if stale == 0 else RATES[:2], start=1):
        learner.train(rate)
        try:
            result["gaps"].append(asyncio.run(bus.publish(version))["weights/probe_gap_max"])
        except WeightSyncError as error:
            result["refused"].append(str(error))
            break
    result["stale"] = {STALE[stale]: stale_publish(bus, learner, STALE[stale])}
    engine.close()
    print(json.dumps(result))


if __name__ == "__main__":
    os.environ.update(engine_environment(CONFIG, "cpu"))
    main(Path(sys.argv[1]), int(sys.argv[2]))
