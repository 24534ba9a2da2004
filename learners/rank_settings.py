"""What a learner rank is told, and the environment it needs. Light: imported by the driver."""

from __future__ import annotations

from dataclasses import dataclass

from rlsys.config import LearnerConfig, ObjectiveConfig


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
        variables |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    return variables
