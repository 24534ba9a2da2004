"""The schema of the sections of models that have engines of their own and are not trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlsys.config.section import Section


class ServedModelConfig(Section):
    path: str
    """Folder or hub id of the model."""
    count: int = Field(default=1, ge=1)
    """Number of engines of this model. Each is a process."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs of one engine. A value above 1 needs run.device cuda."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format of the engine's weights and cache."""
    max_model_len: int = Field(default=256, ge=16)
    """Maximum length of a prompt plus its chain, in tokens of this model."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Maximum number of sequences that an engine decodes at the same time."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """Size of the key-value cache of one engine, in GiB."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory that must be free when an engine starts. Lower it where other processes use the GPU."""


class TeacherConfig(Section):
    model: ServedModelConfig | None = None
    """Model that scores the tokens of the policy, with the tokenizer of the policy. null: no teacher."""
    in_learner: str | None = None
    """Folder or hub id of a model that the learner itself holds, with the tokenizer of the policy, for
    objective.distill.divergence whole. null: the policy that the stage began with."""
