"""The parts of a run that the controller uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rlsys.config.schema import Config
from rlsys.control.stop_request import StopRequest
from rlsys.control.weights import WeightBus
from rlsys.data.batches import TrainingData
from rlsys.data.prompts import PromptStream
from rlsys.display import Display
from rlsys.interfaces import Learner, RolloutPool
from rlsys.models.folder import weights_digest
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.ledger import Ledger
from rlsys.run.metrics import MetricsWriter
from rlsys.run.rollout_files import RolloutLog
from rlsys.types import Int32Array, Prompt


class SearchStage(Protocol):
    """The work of the stage `search`: grow trees with the present policy, and extract the data of later stages."""

    def is_complete(self, policy: Path) -> bool:
        """Return whether the stage is already finished, with this policy."""
        ...

    async def run(self, policy: Path, stop: StopRequest) -> Mapping[str, float]:
        """Do the missing work with actors that serve `policy`; return metrics by names of rlsys.run.metrics.

        Raises:
            InterruptedRunError: the run was asked to stop and trees are missing; finished ones are kept.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """The parts of a run that the controller uses.

    Attributes:
        model: the folder of the initial policy.
        tokenizer_files: files to copy into the folder of every policy.
        search: the work of the stage `search`; None for a run without that stage.
        fingerprint: digests of everything that the run reads (`Inputs.fingerprint`), kept in every checkpoint.
        policy_digest: returns a digest of all weights of a policy folder.
        decode: returns the text of token ids, for people.
        rollouts: keeps some rollouts of every online step; None keeps none.
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
    decode: Callable[[Int32Array], str] = str
    rollouts: RolloutLog | None = None
