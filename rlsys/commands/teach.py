"""`rlsys teach`: write the scores of a teacher beside supervised rows, so that training needs no engine of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlsys.config.engine_roles import engine_settings
from rlsys.config.schema import Config
from rlsys.data.rows import Reader, SupervisedRows
from rlsys.data.teacher_columns import SCORED_IDS
from rlsys.errors import ConfigError
from rlsys.launch.access import child_environment
from rlsys.launch.prepare import check_same_tokens
from rlsys.models.folder import ModelFolder, given_model
from rlsys.outputs import check_file
from rlsys.tables.sources import Part

ROWS_AT_ONCE = 256
"""Rows that are scored and written together, which bounds the memory."""


def run(config: Config, output: Path, *, overwrite: bool = False) -> str:
    """Score the rows of `sft.path` with an engine of `teacher.model` in this process, and write them as Parquet.

    Args:
        config: `sft.path` names the rows, `model.path` the policy that encodes them, `teacher.model` the teacher, and
            `objective.distill.top_k` the number of tokens at each place.
        output: the file to write; sft.path of the run that trains on it.

    Returns:
        The closing line for the user.

    Raises:
        ConfigError: a field is missing, the output exists, or the tokenizers differ.
        DataError: the rows cannot be used.
    """
    policy, teacher = _models(config)
    if output.suffix != ".parquet":
        raise ConfigError(f"{output}: expected the name of a new file that ends with .parquet; choose another name")
    check_file(output, "FILE", overwrite=overwrite)
    rows = _rows(config, policy)
    os.environ.update(child_environment(local=True))  # before vllm is imported
    from actors.engine import Engine

    assert config.teacher.model is not None  # noqa: S101 - checked above
    settings = engine_settings(config, "teacher", config.teacher.model)
    engine = Engine(teacher.path, settings, config.run.device, teacher.end_token_ids)
    schema = pa.schema([(name, column.type) for name, column in SCORED_IDS.items()])
    unfinished = output.with_name(f".{output.name}.unfinished")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with pq.ParquetWriter(unfinished, schema, compression="zstd") as file:
            for start in range(0, len(rows), ROWS_AT_ONCE):
                numbers = range(start, min(start + ROWS_AT_ONCE, len(rows)))
                columns = scored(engine, rows, numbers, config.objective.distill.top_k)
                columns["tokenizer"] = [teacher.tokenizer_digest] * len(numbers)
                file.write_table(pa.table(columns, schema=schema))
        os.replace(unfinished, output)
    finally:
        engine.close()
        unfinished.unlink(missing_ok=True)
    return "\n".join([*rows.notes, f"{len(rows):,} rows scored", f"written to {output}"])


def scored(engine: Any, rows: SupervisedRows, numbers: Sequence[int], tokens: int) -> dict[str, Any]:
    """Return the columns of some rows, with the `tokens` most probable tokens of an engine at each trained token.

    The first token of a row is never trained, because nothing predicts it.
    """
    picked = [rows.row(number) for number in numbers]
    scores = [future.result() for future in engine.token_scores([row.token_ids for row in picked], tokens)]
    masks = [np.concatenate([[False], row.loss_mask[1:]]) for row in picked]
    return {
        "token_ids": [row.token_ids.tolist() for row in picked],
        "loss_mask": [mask.tolist() for mask in masks],
        "teacher_ids": [ids[mask[1:]].ravel().tolist() for (ids, _), mask in zip(scores, masks, strict=True)],
        "teacher_logprobs": [
            logprobs[mask[1:]].ravel().tolist() for (_, logprobs), mask in zip(scores, masks, strict=True)
        ],
    }


def _models(config: Config) -> tuple[ModelFolder, ModelFolder]:
    """Return policy and teacher. Raise ConfigError if the config lacks one, or they have different tokenizers."""
    for field, value in (
        ("sft.path", config.sft.path),
        ("model.path", config.model.path),
        ("teacher.model.path", config.teacher.model),
    ):
        if value is None:
            raise ConfigError(f"{field}: expected a value for `rlsys teach`, found none; set it")
    assert config.teacher.model is not None  # noqa: S101 - checked above
    policy = given_model(str(config.model.path), "model.path")
    teacher = given_model(config.teacher.model.path, "teacher.model.path")
    check_same_tokens(policy, teacher, config.objective.distill.top_k)
    return policy, teacher


def _rows(config: Config, policy: ModelFolder) -> SupervisedRows:
    """Read the rows. None is longer than the teacher's context."""
    assert config.teacher.model is not None  # noqa: S101 - checked above
    vocabulary = min(len(policy.tokenizer), policy.vocabulary or len(policy.tokenizer))
    longest = min(config.actors.max_model_len, config.teacher.model.max_model_len)
    reader = Reader(policy.tokenizer, vocabulary, longest, frozenset(policy.end_token_ids))
    part = Part(split=config.sft.split, subset=config.sft.subset)
    return reader.supervised(str(config.sft.path), "sft.path", config.sft.max_bad_rows, part)
