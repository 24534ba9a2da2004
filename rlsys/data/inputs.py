"""The checked inputs of a command: task, tokenizer, and the streams of prompts and training data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlsys.config.environment import active_environment
from rlsys.config.schema import Config
from rlsys.config.stages import stage_plans
from rlsys.data.batches import TrainingData
from rlsys.data.demonstrations import DemonstrationStream
from rlsys.data.prompts import PromptBuilder, PromptStream
from rlsys.data.rows import Reader
from rlsys.data.teacher_columns import ExpectedScores
from rlsys.directory import RunDirectory
from rlsys.models.chat import CheckedEncoder
from rlsys.models.folder import ModelFolder, given_model
from rlsys.models.scratch import UnbuiltModel, scratch_model
from rlsys.models.turns import TurnEncoder
from rlsys.plugins import command_folder, plugin_digests
from rlsys.tasks import build_task
from rlsys.types import Int32Array, StageName

TOKENIZER = "the tokenizer of model.path"
DATA_FIELDS = {
    "letter_count": "task.questions_path",
    "blocksworld": "task.problems_path",
    "dataset": "task.path",
    "benchmark": "task.path",
    "reasoning_gym": "task.datasets",
    "custom": "task.fn",
}
"""Field of the config that names the data of a task, by its type."""


def prepare_model(config: Config, run_dir: Path, *, build: bool = True) -> ModelFolder:
    """Return the initial policy: made from scratch in the run directory, a local folder, or downloaded from the hub.

    Args:
        config: the config of the run.
        run_dir: the run directory that gets a model from scratch.
        build: False to write nothing; a model from scratch then has a tokenizer and a size, but no weights.

    Raises:
        ConfigError: model.path is neither a model folder nor a hub id that can be fetched.
    """
    scratch = config.model.from_scratch
    if scratch is None:
        return given_model(str(config.model.path), "model.path")
    vocabulary = build_task(config.task, config.run.seed).vocabulary()
    if not build:
        return UnbuiltModel(scratch, vocabulary, RunDirectory(run_dir).model)
    return scratch_model(scratch, vocabulary, config.run.seed, run_dir)


class Inputs:
    """Task, tokenizer and data streams of a command.

    Attributes:
        task: the task of the config.
        encode_demonstration: returns the token ids of a demonstration, and which are trained.
        builder: builder of prompts from the task's problems.
        held_out: the held-out prompts of an evaluation.
        prompts: the stream of training prompts.
        data: demonstrations and preference pairs of the training steps.
        pad_token_id: the token that pads the rows of a batch.

    Args:
        config: the config of the command.
        model: the policy, whose tokenizer encodes the data.
        training: whether training prompts, demonstrations and data files will be used; if so they are checked.

    Raises:
        ConfigError, DataError: the data cannot be used.
    """

    def __init__(self, config: Config, model: ModelFolder, *, training: bool = True) -> None:
        task, tokenizer = build_task(config.task, config.run.seed), model.tokenizer
        encoder = CheckedEncoder(tokenizer, model.vocabulary, _turn_encoder(config, tokenizer))
        max_bad_rows = getattr(config.task, "max_bad_rows", None)
        self.encode_demonstration = encoder.demonstration
        self.builder = PromptBuilder(
            task,
            encoder.prompt,
            max_model_len=config.actors.max_model_len,
            max_tokens=config.sampling.max_tokens,
            max_bad_rows=max_bad_rows,
        )
        if training:
            self.builder.check("train")
        self.held_out = self.builder.held_out(config.evaluation.prompts)
        self.prompts = PromptStream(self.builder, config.run.seed)
        demonstrations: dict[StageName, DemonstrationStream] = {
            plan.name: DemonstrationStream(
                task,
                encoder.demonstration,
                seed=config.run.seed,
                rows_per_step=source.per_step,
                max_tokens=config.actors.max_model_len,
                max_bad_rows=max_bad_rows,
            )
            for plan in stage_plans(config)
            if (source := plan.source("demonstrations"))
        }
        vocabulary = min(len(tokenizer), model.vocabulary or len(tokenizer))
        ends, longest = frozenset(model.end_token_ids), config.actors.max_model_len
        reader = Reader(tokenizer, vocabulary, longest, ends, _expected_scores(config, model))
        extracted = RunDirectory(Path(config.run.dir).absolute()).search_stage.data
        self.data = TrainingData(config, reader, demonstrations, extracted)
        if training:
            self.data.check()
        pad = tokenizer.pad_token_id
        usable = pad is not None and pad < vocabulary  # padding is masked, so any token of the model will do
        self.pad_token_id = int(pad if usable else tokenizer.eos_token_id)
        self._task_notes = task.notes()
        self.task, self._config, self._model, self._training = task, config, model, training

    @property
    def notes(self) -> list[str]:
        """Remarks on the data for the user, one line each."""
        return [*self._task_notes, *self.builder.notes, *self.data.notes]

    def fingerprint(self) -> dict[str, str]:
        """Return digests of data, model, tokenizer and plug-ins, by the config field or source that names each."""
        data = DATA_FIELDS.get(self._config.task.type, "task")  # "task": a task without a file, so without a digest
        digest = self.task.digest()
        if self._training:
            digest = self.data.demonstrations_digest(self.builder.digest(digest))
        return {
            data: digest,
            "model.path" if self._config.model.path else "model.from_scratch": self._model.digest,
            TOKENIZER: self._model.tokenizer_digest,
            **(self.data.fingerprint() if self._training else {}),
            **plugin_digests(self._config.model_dump(mode="json", exclude={"task"}), command_folder()),
        }

    def probe(self, tokens: int = 0) -> list[Int32Array]:
        """Return the token ids of the held-out prompts that check every publish.

        Args:
            tokens: tokens to be predicted at least, if there are so many held-out prompts.
        """
        rows: list[Int32Array] = []
        predicted = 0
        for prompt in self.held_out:
            if len(rows) >= self._config.weight_sync.probe_rows and predicted >= tokens:
                break
            rows.append(prompt.token_ids)
            predicted += len(prompt.token_ids) - 1
        return rows


def _turn_encoder(config: Config, tokenizer: Any) -> TurnEncoder | None:
    """Return the encoder of the texts of the environment; None without one."""
    environment = active_environment(config.environment, config.task)
    return TurnEncoder(tokenizer, environment.role) if environment else None


def _expected_scores(config: Config, model: ModelFolder) -> ExpectedScores | None:
    """Return which scores of a teacher the rows of a file may have; None if no term reads them."""
    distill = config.objective.distill
    if not distill.on_rows or distill.divergence == "whole":
        return None
    optional = config.teacher.model is not None
    return ExpectedScores(tokens=distill.top_k, tokenizer=model.tokenizer_digest, optional=optional)
