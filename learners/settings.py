"""Settings of a learner rank, its environment and the DeepSpeed configuration. Imported by the driver, so no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlsys.config.objective import ObjectiveConfig
from rlsys.config.schema import LearnerConfig, LoraConfig, OptimizerConfig, WeightSyncConfig
from rlsys.plugins import FOLDER, command_folder
from rlsys.processes import openmp_environment


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSettings:
    """Settings of a rank that stay the same during the run.

    Attributes:
        store: file of the process-group rendezvous; every attempt has a new file.
        max_tokens: length limit of a completion, `sampling.max_tokens`.
        weight_sync: how rank 0 sends weights.
        engine_workers: workers of the engine of one actor.
        attempt: number of earlier groups of ranks in this command.
        lora: section `model.lora`; None if all weights are trained.
        base: folder of the model that has the adapter; used with `lora` alone.
        teacher: folder of `teacher.in_learner`; None for the policy that a stage began with.
    """

    rank: int
    ranks: int
    device: str
    store: str
    seed: int
    pad_token_id: int
    temperature: float
    max_tokens: int
    learner: LearnerConfig
    objective: ObjectiveConfig
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    engine_workers: int = 1
    attempt: int = 0
    lora: LoraConfig | None = None
    base: Path = Path()
    teacher: Path | None = None

    @property
    def shares(self) -> int:
        """Number of shares of the rows. The ranks of a sequence-parallel group have one together."""
        return self.ranks // self.learner.sequence_parallel

    @property
    def share(self) -> int:
        """Number of this rank's share, from 0."""
        return self.rank // self.learner.sequence_parallel

    @property
    def reports(self) -> bool:
        """Whether the values of this rank's share count, which the other ranks of its group have as well."""
        return self.rank % self.learner.sequence_parallel == 0


def learner_environment(config: LearnerConfig, device: str, rank: int) -> dict[str, str]:
    """Return the environment variables of a rank. They must be set before deepspeed is imported."""
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(config.ranks),
        **openmp_environment(config.threads),
        "DS_SKIP_CUDA_CHECK": "1",
        FOLDER: command_folder(),
    }
    if device == "cpu":
        variables |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return variables


def deepspeed_config(
    learner: LearnerConfig, optimizer: OptimizerConfig, parameters: int, device: str
) -> dict[str, Any]:
    """Build the DeepSpeed configuration from our fields.

    Args:
        learner: configuration of the learner.
        optimizer: configuration of the optimizer.
        parameters: number of parameters of the model.
        device: "cpu" or "cuda".
    """
    # DeepSpeed allocates whole buckets in every step, and its default size of 5e8 costs seconds on a small model. The
    # size must be even.
    bucket = min(parameters + parameters % 2, 50_000_000)
    bf16 = learner.dtype == "bf16"
    # DeepSpeed's ZeRO 1 sums the gradients of passes in bf16, or has an optimizer of another kind. Its ZeRO 2 shards
    # the same states, and the gradients too.
    zero: dict[str, Any] = {
        "stage": max(learner.zero_stage, 2) if bf16 else learner.zero_stage,
        "overlap_comm": device == "cuda",
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if learner.optimizer_offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # our step() ends an update: its micro-batches vary in number
        "gradient_clipping": optimizer.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # the fused CPU optimizer needs a compiler at run time
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
