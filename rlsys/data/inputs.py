"""What a run reads: task, tokenizer, and the streams made of them."""

from __future__ import annotations

from pathlib import Path

from rlsys.config.schema import Config
from rlsys.config.stages import stage_plans
from rlsys.data.batches import TrainingData
from rlsys.data.demonstrations import DemonstrationStream
from rlsys.data.prompts import PromptBuilder, PromptStream
from rlsys.data.rows import Reader
from rlsys.directory import RunDirectory
from rlsys.models.folder import initial_model_folder, model_digest
from rlsys.models.scratch import encode_demonstration, encode_prompt, load_tokenizer, tokenizer_digest
from rlsys.tasks import build_task
from rlsys.types import Int32Array, StageName

TOKENIZER = "the tokenizer of model.path"


def prepare_model(config: Config, run_dir: Path) -> Path:
    """Return the folder of the initial policy: built in the run directory, local, or downloaded from the hub.

    Raises:
        ConfigError: model.path is neither a model folder nor a hub id that can be fetched.
    """
    return initial_model_folder(config, run_dir, lambda: build_task(config.task, config.run.seed).vocabulary())


class Inputs:
    """Task, tokenizer and the streams made of them. data: what stages train on beside rollouts.

    notes: what the user should know of the data, a line each.

    Args:
        training: whether training prompts, demonstrations and data files will be used, so that they must be checked.
    Raises:
        ConfigError, DataError: the data cannot be used.
    """

    def __init__(self, config: Config, model: Path, *, training: bool = True) -> None:
        task = build_task(config.task, config.run.seed)
        tokenizer = load_tokenizer(model)
        self.builder = PromptBuilder(
            task,
            lambda question: encode_prompt(tokenizer, question),
            max_model_len=config.actors.max_model_len,
            max_tokens=config.sampling.max_tokens,
        )
        if training:
            self.builder.check("train")
        self.held_out = self.builder.held_out(config.evaluation.prompts)
        self.prompts = PromptStream(self.builder, config.run.seed)
        demonstrations: dict[StageName, DemonstrationStream] = {
            plan.name: DemonstrationStream(
                task,
                lambda question, chain: encode_demonstration(tokenizer, question, chain),
                seed=config.run.seed,
                rows_per_step=source.per_step,
                max_tokens=config.actors.max_model_len,
            )
            for plan in stage_plans(config)
            if (source := plan.source("demonstrations"))
        }
        reader = Reader(tokenizer, len(tokenizer), config.actors.max_model_len)
        extracted = RunDirectory(Path(config.run.dir).absolute()).search_stage.data
        self.data = TrainingData(config, reader, demonstrations, extracted)
        if training:
            self.data.check()
        self.pad_token_id = int(
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
        self._rows = config.weight_sync.probe_rows
        self.notes = [*task.notes(), *self.data.notes]
        self._config, self._model, self._task, self._training = config, model, task, training

    def fingerprint(self) -> dict[str, str]:
        """Digests of what the config only names, by the field that names it: data, model and tokenizer."""
        data = {"dataset": "task.path", "blocksworld": "task.problems_path"}.get(
            self._config.task.type, "task.questions_path"
        )
        return {
            data: self._task.digest(),
            "model.path" if self._config.model.path else "model.from_scratch": model_digest(self._model),
            TOKENIZER: tokenizer_digest(self._model),
            **(self.data.fingerprint() if self._training else {}),
        }

    def probe(self) -> list[Int32Array]:
        """Fixed rows for the check of every publish: held-out prompts."""
        return [prompt.token_ids for prompt in self.held_out[: self._rows]]
