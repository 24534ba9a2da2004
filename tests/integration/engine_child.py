"""Engines without Ray: write as JSON what each computed before, during and after weight updates.

Usage: engine_child.py MODEL_FOLDER... Every engine is a fork, which shares the imports, and writes to measured.json in
the folder of its model.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from local_weights import deliveries
from transformers import AutoModelForCausalLM

from actors.engine import Completion, CompletionRequest, Engine
from actors.engine_build import engine_environment
from learners.deepspeed.parameters import published_tensors, trained_parameters
from rlsys.config.schema import ActorsConfig
from rlsys.errors import WeightSyncError

# 70 tokens: two full blocks of 32 go into the prefix cache.
PROMPT = [5 + i % 40 for i in range(70)]
ROWS = [np.arange(5, 55, dtype=np.int32), np.arange(60, 10, -1, dtype=np.int32)]
MAX_TOKENS = 150
CONFIG = ActorsConfig(max_model_len=256, max_num_seqs=32, kv_cache_gib=0.1, block_size=32)


def request(number: int, name: str, max_tokens: int) -> CompletionRequest:
    return CompletionRequest(
        request_id=f"{name}-{number}",
        token_ids=PROMPT,
        seed=number,
        temperature=1.0,
        top_p=1.0,
        max_tokens=max_tokens,
    )


@torch.no_grad()
def learner_logprobs(model: Any, row: np.ndarray) -> np.ndarray:
    """Return log p(token t+1 | tokens 0..t) as a learner computes it."""
    ids = torch.from_numpy(row.astype(np.int64))[None]
    return model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0].numpy()


def row_gap(engine: Engine, model: Any) -> float:
    found = engine.prompt_logprobs(ROWS)
    return max(float(np.abs(a - learner_logprobs(model, row)).max()) for a, row in zip(found, ROWS, strict=True))


def completion_gap(completion: Completion, model: Any, tokens: int) -> float:
    """Return the largest gap of the first `tokens` sampled tokens."""
    row = np.concatenate([np.array(PROMPT, dtype=np.int32), completion.token_ids])
    expected = learner_logprobs(model, row)[len(PROMPT) - 1 :]
    return float(np.abs(completion.logprobs - expected)[:tokens].max())


def publish(engine: Engine, model: Any, version: int) -> None:
    """Take the bus's own path: parameters by name, buckets, checksums, load."""
    engine.update_weights(version, 0, deliveries(published_tensors(model, lambda p: p.detach()), version))


def step(model: Any, size: float, seed: int) -> None:
    """Change every trained parameter, as an optimizer update would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in trained_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def updated_in_flight(engine: Engine, model: Any) -> Iterator[tuple[str, Any]]:
    """Change the weights while requests run, and compare the tokens that the older weights had made by then."""
    futures = engine.submit([request(number, "flight", MAX_TOKENS) for number in range(16)])
    time.sleep(0.1)
    old = {key: value.clone() for key, value in model.state_dict().items()}
    step(model, 0.02, seed=2)
    publish(engine, model, 2)
    done = [future.result() for future in futures]
    yield "spans", [[[span.start, span.version] for span in completion.versions] for completion in done]
    yield "lengths", [len(completion.token_ids) for completion in done]
    model.load_state_dict(old)
    mixed = [completion for completion in done if len(completion.versions) == 2]
    yield "gap_first_span", max((completion_gap(c, model, c.versions[1].start) for c in mixed), default=None)
    step(model, 0.02, seed=2)


def main(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = Engine(folder, CONFIG, "cpu", end_token_ids=[1])
    found: dict[str, Any] = {"gap_fresh": row_gap(engine, model)}
    engine.submit([request(0, "warm", 4)])[0].result()  # fills the prefix cache with version 0
    step(model, 0.02, seed=1)
    found["gap_before_update"] = row_gap(engine, model)
    publish(engine, model, 1)
    found["gap_updated"] = row_gap(engine, model)
    after = engine.submit([request(0, "after", 30)])[0].result()
    found["gap_same_prompt"] = completion_gap(after, model, 30)
    found["versions_after"] = [span.version for span in after.versions]
    found |= updated_in_flight(engine, model)
    found["gap_after_flight"] = row_gap(engine, model)
    step(model, 1e-4, seed=3)  # as small as one optimizer update at learning rate 1e-4
    names = [name for name, _ in published_tensors(model, lambda p: p.detach())]
    found["names"] = names
    tensors = [(name, value) for name, value in model.state_dict().items() if name != "lm_head.weight"]
    try:
        engine.update_weights(3, 0, deliveries(tensors, 3))
        found["refusal_without_output_layer"] = ""
        found["gap_without_output_layer"] = row_gap(engine, model)
    except WeightSyncError as error:
        found["refusal_without_output_layer"] = error.message
    engine.close()
    (folder / "measured.json").write_text(json.dumps(found))


def fork_engines(folders: list[Path], main: Callable[[Path], None]) -> None:
    """Run main(folder) for every folder; exit with 1 if an engine failed."""
    os.environ.update(engine_environment(CONFIG, "cpu"))
    import vllm.v1.engine.llm_engine  # noqa: F401

    forks = []
    for folder in folders:
        if (child := os.fork()) == 0:
            main(folder)
            sys.exit()
        forks.append(child)
    codes = [os.waitpid(child, 0)[1] for child in forks]
    sys.exit(any(codes))


if __name__ == "__main__":
    fork_engines([Path(argument) for argument in sys.argv[1:]], main)
