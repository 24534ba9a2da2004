"""A bf16 learner rank that sums a large gradient and many small ones. The last line of stderr is the norm.

Usage: accumulation_child.py ZERO_STAGE FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from rlsys.config.objective import ObjectiveConfig
from rlsys.config.schema import LearnerConfig, OptimizerConfig

LARGE, SMALL, PASSES = 1.0, 2.0**-9, 256


def main(stage: int, folder: Path) -> None:
    from learners.settings import RankSettings, learner_environment

    config = LearnerConfig(ranks=1, zero_stage=stage, dtype="bf16")  # type: ignore[arg-type]
    os.environ.update(learner_environment(config, "cpu", 0))
    import torch
    from transformers import PreTrainedConfig

    from learners.deepspeed.engine import TrainedModel, join_process_group

    settings = RankSettings(
        rank=0,
        ranks=1,
        device="cpu",
        store=str(folder / "store"),
        seed=0,
        pad_token_id=0,
        temperature=1.0,
        max_tokens=8,
        learner=config,
        objective=ObjectiveConfig(),
    )
    join_process_group(settings)
    module = torch.nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    model = TrainedModel("critic", module, PreTrainedConfig(), settings, OptimizerConfig(max_grad_norm=100.0), 10)
    for size in (LARGE, *(SMALL,) * PASSES):
        row = torch.tensor([[size, 0.0]], dtype=torch.bfloat16)
        model.backward(model(input=row).float().sum(), "test", {"version": 1, "update": 0})
    print(json.dumps(model.update()[0]), file=sys.stderr)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
