"""What a learner rank is told, what it tells DeepSpeed, and its environment. Light: imported by the driver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlsys.config.objective import ObjectiveConfig
from rlsys.config.schema import LearnerConfig, OptimizerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSettings:
    """What a rank must know that does not change during the run."""

    rank: int
    ranks: int
    device: str
    store: str  # file of the process-group rendezvous, one per attempt
    seed: int
    pad_token_id: int
    temperature: float
    max_tokens: int
    learner: LearnerConfig
    objective: ObjectiveConfig
    attempt: int = 0  # how many groups of ranks there were before


def learner_environment(config: LearnerConfig, device: str, rank: int) -> dict[str, str]:
    """Environment variables that must be set before deepspeed is imported."""
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(config.ranks),
        "OMP_NUM_THREADS": str(config.threads),
        "DS_SKIP_CUDA_CHECK": "1",
    }
    if device == "cpu":
        variables |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return variables


def deepspeed_config(learner: LearnerConfig, optimizer: OptimizerConfig, parameters: int) -> dict[str, Any]:
    """DeepSpeed's own configuration, made of our fields. parameters: size of the model."""
    # DeepSpeed allocates whole buckets afresh in every step; its default of 5e8 costs seconds on a small model.
    # It wants an even one.
    bucket = min(parameters + parameters % 2, 50_000_000)
    zero: dict[str, Any] = {
        "stage": learner.zero_stage,
        "overlap_comm": False,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if learner.optimizer_offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # step() is the boundary: micro-batches differ in size and number
        "gradient_clipping": optimizer.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # the fused one needs a compiler at run time
        "bf16": {"enabled": learner.dtype == "bf16"},
    }
