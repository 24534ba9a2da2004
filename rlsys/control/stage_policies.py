"""The policies that stages export and that later stages begin with or refer to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from rlsys.config.schema import Config
from rlsys.config.stages import stage_plans
from rlsys.directory import CheckpointDirectory, RunDirectory
from rlsys.errors import CheckpointError, DamagedFileError
from rlsys.files import fsync
from rlsys.models.adapters import ADAPTER_FILES, merge_adapter
from rlsys.types import StageName


@dataclass(frozen=True, kw_only=True)
class StagePolicies:
    """Policy folders of a run.

    Attributes:
        model: the folder of the initial policy.
        policy_digest: returns a digest of all weights of a policy folder.
    """

    config: Config
    run_dir: Path
    model: Path
    policy_digest: Callable[[Path], str]

    def exported(self, stage: StageName) -> Path:
        """Return the folder of the policy that a stage exports."""
        return RunDirectory(self.run_dir).exported_policy(stage)

    def discard(self, stage: StageName) -> None:
        """Remove the exported policies of a stage that begins or continues, and of all stages after it.

        They exist if max_steps was raised, or if the run went back to an earlier checkpoint.
        """
        plans = stage_plans(self.config)
        first = [plan.name for plan in plans].index(stage)
        for plan in plans[first:]:
            if plan.trains:
                shutil.rmtree(self.exported(plan.name), ignore_errors=True)

    def export_policy(self, stage: StageName, checkpoint: Path) -> None:
        """Export the policy of a finished stage, as hard links to its checkpoint if the file system has them.

        With model.lora.merge, the last stage exports a whole model; earlier ones export what later ones begin with.

        Raises:
            CheckpointError: the folder cannot be written. The stage is saved, so the same command tries again.
        """
        target = self.exported(stage)
        temporary = target.with_name(f".{stage}")  # a folder under the final name is complete
        for folder in (target, temporary):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            policy, lora = CheckpointDirectory(checkpoint).policy, self.config.model.lora
            merges = lora is not None and lora.merge and stage == self.config.stages[-1]
            for path in sorted(policy.iterdir()):
                if not (merges and path.name in ADAPTER_FILES):
                    _link(path, temporary / path.name)
            if lora is not None and merges:
                merge_adapter(self.model, policy, lora, temporary, self.config.learner.dtype)
            for path in sorted(temporary.iterdir()):
                fsync(path)
            fsync(temporary)
            temporary.rename(target)
            for folder in (target.parent, target.parent.parent):  # `stages` may be new
                fsync(folder)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{target} could not be written: {error}; free disk space, or check the folder of run.dir. "
                f"{checkpoint.name} is saved, the same command continues"
            ) from error

    def initial_policy(self, stage_number: int) -> Path:
        """Return the policy that a stage began with: the export of the training stage before it, or the model."""
        before = [plan.name for plan in stage_plans(self.config)[:stage_number] if plan.trains]
        return self.exported(before[-1]) if before else self.model

    def digest(self, policy: Path) -> str:
        """Return the digest of a policy.

        Raises:
            DamagedFileError: the folder cannot be read.
        """
        try:
            return self.policy_digest(policy)
        except (OSError, ValueError) as error:
            reason = f"the policy cannot be read: {error}; restore the folder, or start a new run.dir"
            raise DamagedFileError(f"{policy}: {reason}") from error


def _link(path: Path, target: Path) -> None:
    try:
        target.hardlink_to(path)
    except OSError:  # some network file systems have no hard links
        shutil.copyfile(path, target)
