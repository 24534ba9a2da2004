"""Episodes of a real engine with real verifier processes: write as JSON what they and a learner's model computed.

Usage: environment_child.py FOLDER. The folder gets a model whose weights are random, so its turns are, too.
"""

from __future__ import annotations

import asyncio
import json
import string
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from actors.engine import Engine
from actors.rollouts.multi_turn import Episodes
from actors.verifiers.pool import RewardPool
from rlsys.config.environment import EnvironmentConfig
from rlsys.config.rewards import RewardsConfig
from rlsys.config.schema import ActorsConfig, FromScratchConfig
from rlsys.config.tasks import LetterCountConfig
from rlsys.environments import Reply
from rlsys.models.folder import ModelFolder
from rlsys.models.scratch import build_from_scratch
from rlsys.types import Problem, Prompt, SamplingSettings, Trajectory, TrajectoryGroup

SIZE = FromScratchConfig(hidden_size=64, layers=2, heads=2, intermediate_size=128, max_positions=256)
CONFIG = ActorsConfig(max_model_len=120, max_num_seqs=32, kv_cache_gib=0.1)
SETTINGS = SamplingSettings(samples=3, temperature=1.0, top_p=1.0, max_tokens=48, seed=3)
PROMPTS = 6


def count(problem: Problem, turns: Any) -> Reply:
    """Answer with the length of the last turn, which differs from turn to turn."""
    return Reply(text=f"<{problem.answer}:{len(turns[-1])}>" if turns else "", done=len(turns) == 5)


def prompts(model: ModelFolder) -> list[Prompt]:
    texts = [f"count {letter} in abc" for letter in string.ascii_lowercase[:PROMPTS]]
    return [
        Prompt(prompt_id=text, token_ids=np.array(model.tokenizer(text)["input_ids"], np.int32), answer=f"{number}")
        for number, text in enumerate(texts)
    ]


def log_probabilities(model: Any, trajectory: Trajectory) -> list[float]:
    """Return those of the tokens of the policy, given all tokens before, as a learner computes them."""
    ids = torch.from_numpy(trajectory.token_ids.astype(np.int64))[None]
    with torch.no_grad():
        scores = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    return scores[torch.from_numpy(trajectory.loss_mask[1:])].tolist()


async def play(engine: Engine, model: ModelFolder, asked: list[Prompt]) -> list[TrajectoryGroup]:
    stop = tuple(string.ascii_lowercase)
    environment = EnvironmentConfig(fn=f"{__file__}:count", stop=stop, max_turns=5)
    limits = RewardsConfig(memory_mib=4096)  # the module imports torch
    pool = RewardPool(LetterCountConfig(), 0, limits, folder="", environment=environment)
    try:
        episodes = Episodes(engine, pool, model.tokenizer, model.end_token_ids, environment, CONFIG.max_model_len)
        return list(await asyncio.gather(*await episodes.start(asked, SETTINGS)))  # type: ignore[arg-type]
    finally:
        await pool.close()


def main() -> None:
    folder = Path(sys.argv[1])
    build_from_scratch(SIZE, [*string.ascii_lowercase, " ", "<", ">", ":"], 0, folder)
    model, learner = ModelFolder(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = Engine(folder, CONFIG, "cpu", model.end_token_ids, stop_strings=True)
    asked = prompts(model)
    groups = asyncio.run(play(engine, model, asked))
    again = asyncio.run(play(engine, model, asked[::-2]))
    cached = engine.engine_stats().cached_tokens
    engine.close()
    rows = {group.prompt.prompt_id: [_row(each, model, learner) for each in group.trajectories] for group in groups}
    repeated = {group.prompt.prompt_id: [_row(each, model, learner) for each in group.trajectories] for group in again}
    print(json.dumps({"rows": rows, "repeated": repeated, "cached": cached}))


def _row(trajectory: Trajectory, model: ModelFolder, learner: Any) -> dict[str, Any]:
    return {
        "text": model.tokenizer.decode(trajectory.token_ids.tolist()),
        "own": model.tokenizer.decode(trajectory.token_ids[trajectory.loss_mask].tolist()),
        "turns": trajectory.turns,
        "finish": trajectory.finish_reason,
        "outcome": trajectory.outcome,
        "tokens": trajectory.token_ids.tolist(),
        "sampled": trajectory.behavior_logprobs[trajectory.loss_mask].tolist(),
        "learned": log_probabilities(learner, trajectory),
        "starts": [span.start for span in trajectory.versions],
    }


if __name__ == "__main__":
    main()
