"""One engine with its tokenizer, without Ray: prints as JSON where requests stopped, and what was cached.

Usage: stop_child.py MODEL_FOLDER
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.engine import Completion, CompletionRequest, Engine
from rlsys.config.schema import ActorsConfig
from rlsys.models.chat import end_token_ids
from rlsys.models.folder import load_tokenizer

PROMPT = [5 + i % 40 for i in range(70)]  # two full blocks of 32 go into the prefix cache
MAX_TOKENS, REQUESTS = 40, 24


def request(seed: int, **stops: Any) -> CompletionRequest:
    return CompletionRequest(
        request_id=f"r{seed}",
        token_ids=PROMPT,
        seed=seed,
        temperature=1.0,
        top_p=1.0,
        max_tokens=MAX_TOKENS,
        **stops,
    )


def draw(engine: Engine, requests: list[CompletionRequest]) -> list[Completion]:
    return [future.result() for future in engine.submit(requests)]


def piece(tokenizer: Any, completion: Completion) -> str | None:
    """A text that begins and, where it can, ends inside a token of the completion, and lies in three or more."""
    ids = completion.token_ids.tolist()
    for start in range(2, len(ids) - 3):
        texts = [tokenizer.decode([token]) for token in ids[start : start + 4]]
        if all(text.isascii() for text in texts) and len(texts[0]) > 1:
            return "".join(texts)[1 : -1 if len(texts[-1]) > 1 else None]
    return None


def many_long_prompts(engine: Engine) -> list[Completion]:
    """More prompt tokens at once than one step of the engine takes (8192), with no common prefix."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, 200, size=180).tolist() for _ in range(64)]
    return draw(engine, [replace(request(i), token_ids=ids, max_tokens=2) for i, ids in enumerate(prompts)])


def gap(engine: Engine, completion: Completion) -> float:
    """Largest difference of the completion's log-probabilities from those of the whole row, computed at once."""
    row = np.asarray([*PROMPT, *completion.token_ids], dtype=np.int32)
    (expected,) = engine.prompt_logprobs([row])
    return float(np.abs(completion.logprobs - expected[len(PROMPT) - 1 :]).max())


def rows(completions: list[Completion]) -> list[dict[str, Any]]:
    return [
        {
            "ids": completion.token_ids.tolist(),
            "logprobs": completion.logprobs.tolist(),
            "finish_reason": completion.finish_reason,
            "cached": completion.cached_tokens,
        }
        for completion in completions
    ]


def main(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    config = ActorsConfig(max_model_len=256, max_num_seqs=64, kv_cache_gib=0.1, block_size=32)
    engine = Engine(folder, config, "cpu", end_token_ids(tokenizer, folder), stop_strings=True)
    engine.engine_stats()
    (first,) = draw(engine, [request(99)])
    free = draw(engine, [request(seed) for seed in range(REQUESTS)])
    usage = engine.engine_stats()
    strings = {seed: text for seed, completion in enumerate(free) if (text := piece(tokenizer, completion))}
    stopped = draw(engine, [request(seed, stop_strings=("~~~", text)) for seed, text in strings.items()])
    token = int(np.bincount(np.concatenate([completion.token_ids for completion in free])).argmax())
    found = {
        "first": rows([first])[0],
        "free": rows(free),
        "strings": list(strings.items()),
        "stopped": rows(stopped),
        "gap": max(gap(engine, completion) for completion in stopped),
        "token": token,
        "at_token": rows(draw(engine, [request(seed, stop_token_ids=(token,)) for seed in range(REQUESTS)])),
        "usage": asdict(usage),
        "long": rows(many_long_prompts(engine)),
    }
    engine.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
