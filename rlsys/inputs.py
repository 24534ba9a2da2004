"""What a run reads: task, tokenizer, and the streams made of them."""

from __future__ import annotations

from pathlib import Path

from rlsys.config import Config
from rlsys.demonstrations import DemonstrationStream
from rlsys.models import encode_demonstration, encode_prompt, load_tokenizer
from rlsys.prompts import PromptBuilder, PromptStream
from rlsys.tasks import build_task
from rlsys.types import Int32Array


class Inputs:
    """Task, tokenizer and the streams made of them.

    Raises:
        ConfigError, DataError: the data cannot be used.
    """

    def __init__(self, config: Config, model: Path) -> None:
        task = build_task(config.task, config.run.seed)
        tokenizer = load_tokenizer(model)
        self.builder = PromptBuilder(
            task,
            lambda question: encode_prompt(tokenizer, question),
            max_model_len=config.actors.max_model_len,
            max_tokens=config.sampling.max_tokens,
        )
        self.builder.check("train")
        self.held_out = self.builder.held_out(config.evaluation.prompts)
        self.prompts = PromptStream(self.builder, config.run.seed)
        self.demonstrations = DemonstrationStream(
            task,
            lambda question, chain: encode_demonstration(tokenizer, question, chain),
            seed=config.run.seed,
            rows_per_step=config.warm_start.rows_per_step,
            max_tokens=config.actors.max_model_len,
        )
        if "warm_start" in config.stages:
            self.demonstrations.rows(0)
        self.pad_token_id = int(
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
        self._rows = config.weight_sync.probe_rows

    def probe(self) -> list[Int32Array]:
        """Fixed rows for the check of every publish: held-out prompts."""
        return [prompt.token_ids for prompt in self.held_out[: self._rows]]
