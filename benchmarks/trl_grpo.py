"""Train by TRL's GRPOTrainer what a config of rlsys trains, and write the seconds and tokens of every step.

`python benchmarks/trl_grpo.py CONFIG FOLDER vllm|transformers OVERRIDES` needs TRL on the path; `grpo_step.py` starts
it. Rewards come from the verifier of the task, in this process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, where a file would hide the package `actors`

from rlsys.config.files import load_config  # noqa: E402
from rlsys.config.schema import Config  # noqa: E402
from rlsys.data.inputs import Inputs, prepare_model  # noqa: E402
from rlsys.models.folder import ModelFolder  # noqa: E402
from rlsys.tasks import build_task  # noqa: E402
from rlsys.types import Problem  # noqa: E402


def main(path: Path, folder: Path, generation: str, overrides: list[str]) -> None:
    config = load_config(path, overrides)
    model = prepare_model(config, folder)
    if generation == "vllm":
        from actors.engine_build import engine_environment

        threads = config.actors.model_copy(update={"threads": int(os.environ["OMP_NUM_THREADS"])})
        os.environ.update(engine_environment(threads, "cpu"))
        os.environ.pop("TORCHDYNAMO_DISABLE", None)  # TRL gives no way to an eager engine, so vLLM compiles
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    task, counts = build_task(config.task, config.run.seed), []

    def reward(completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        counts.append(sum(map(len, completion_ids)))
        problems = [Problem(problem_id="", question="", answer=each) for each in answer]
        return [task.verify(*pair).reward for pair in zip(problems, completions, strict=True)]

    trainer = GRPOTrainer(
        str(model.path),
        reward,
        args=GRPOConfig(**settings(config, folder, use_vllm=generation == "vllm")),
        train_dataset=Dataset.from_list(rows(config, model)),
        processing_class=model.tokenizer,
    )
    times = Times()
    trainer.add_callback(times.callback())
    trainer.train()
    steps = [{"seconds": s, "tokens": t} for s, t in zip(times.seconds, counts, strict=True)]
    (folder / "steps.json").write_text(json.dumps(steps), encoding="utf-8")


def rows(config: Config, model: ModelFolder) -> list[dict[str, str]]:
    """Return the prompts of all steps as text, with their answers. Exit if a text has other tokens than its prompt."""
    stream, tokenizer = Inputs(config, model).prompts, model.tokenizer
    prompts = [stream.take()[1] for _ in range(config.train.groups_per_step * config.train.max_steps)]
    texts = [tokenizer.decode(prompt.token_ids) for prompt in prompts]
    for text, prompt in zip(texts, prompts, strict=True):
        if tokenizer(text)["input_ids"] != prompt.token_ids.tolist():
            raise SystemExit("TRL would see other prompts: the text of a prompt has other tokens")
    return [{"prompt": text, "answer": prompt.answer} for text, prompt in zip(texts, prompts, strict=True)]


def settings(config: Config, folder: Path, *, use_vllm: bool) -> dict[str, Any]:
    """Return the arguments of TRL's GRPOConfig: one update a step, in micro-batches of about the config's tokens."""
    train = config.train
    size = train.groups_per_step * train.group_size
    micro = max(1, min(size, config.learner.micro_batch_tokens // config.actors.max_model_len))
    while size % micro:
        micro -= 1
    return {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": train.max_steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": size // micro,
        "num_generations": train.group_size,
        "max_completion_length": config.sampling.max_tokens,
        "learning_rate": train.optimizer.learning_rate,
        "beta": 0.0,
        "shuffle_dataset": False,
        "use_vllm": use_vllm,
        "vllm_mode": "colocate",
        "vllm_max_model_length": config.actors.max_model_len,
    }


class Times:
    """Seconds between the ends of steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def callback(self) -> Any:
        from transformers import TrainerCallback

        times = self

        class Watch(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                times._last = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                now = time.perf_counter()
                times.seconds.append(now - times._last)
                times._last = now

        return Watch()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
