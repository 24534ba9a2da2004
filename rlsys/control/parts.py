"""Everything the controller drives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rlsys.config.schema import Config
from rlsys.control.weights import WeightBus
from rlsys.data.batches import TrainingData
from rlsys.data.prompts import PromptStream
from rlsys.display import Display
from rlsys.interfaces import Learner, RolloutPool
from rlsys.models.folder import weights_digest
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.ledger import Ledger
from rlsys.run.metrics import MetricsWriter
from rlsys.types import Prompt


class SearchStage(Protocol):
    """The stage `search`: grows trees with the present policy, and makes of them the data of the stages after it."""

    def is_complete(self, policy: Path) -> bool:
        """Whether all of it was done before, by this very policy."""
        ...

    async def run(self, policy: Path, stop: asyncio.Future[str]) -> Mapping[str, float]:
        """Do what is missing, with actors that serve `policy`; answers with names of rlsys.run.metrics.

        Raises:
            InterruptedRunError: `stop` has the name of a signal and trees are missing; finished ones are kept.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run is made of.

    model: the initial policy folder; tokenizer_files: files to put beside a policy; search: where stages name it;
    fingerprint: digests of what the run reads (`Inputs.fingerprint`), kept in every checkpoint;
    policy_digest: tells the weights of policy folders apart.
    """

    config: Config
    run_dir: Path
    model: Path
    tokenizer_files: Sequence[Path]
    pool: RolloutPool
    learner: Learner
    bus: WeightBus
    checkpoints: CheckpointStore
    metrics: MetricsWriter
    ledger: Ledger
    display: Display
    prompts: PromptStream
    data: TrainingData
    held_out: Sequence[Prompt]
    search: SearchStage | None = None
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    policy_digest: Callable[[Path], str] = weights_digest
