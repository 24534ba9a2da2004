"""The checkpoints of a run: when one fails, what it is worth, and the policies that stages hand on."""

from __future__ import annotations

import asyncio
import difflib
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlsys.config.schema import Config
from rlsys.config.stages import stage_plans
from rlsys.control.budgets import causes
from rlsys.control.parts import Parts
from rlsys.directory import RunDirectory
from rlsys.errors import CheckpointError, ConfigError
from rlsys.files import fsync, write_json
from rlsys.run.metrics import METRICS
from rlsys.run.provenance import Provenance
from rlsys.run.state import state_to_json
from rlsys.types import RunState, StageName


def check_best_metric(config: Config) -> None:
    """Raises ConfigError where checkpoint.best_metric is none that a run measures."""
    name = config.checkpoint.best_metric
    if name is not None and name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, 1)
        raise ConfigError(
            f"checkpoint.best_metric: expected null or the name of a metric (see rlsys/run/metrics.py), found {name!r}"
            + (f"; did you mean {near[0]}?" if near else "")
        )


class Saving:
    """Saves run states, and knows the newest checkpoint.

    A save that fails leaves the checkpoints before it as they are. Where the run can do without it, it goes on, for
    checkpoint.max_failed_saves of them in a row.

    checkpoint: the newest one; failed: saves that failed since this command began; seconds: of the last save, until
    `take_seconds`; anchor: by the name "reference" the digest of the policy that the stage began with, where its loss
    refers to that.
    """

    def __init__(self, parts: Parts, state: RunState, checkpoint: Path | None) -> None:
        self.checkpoint = checkpoint
        self.failed = 0
        self.anchor: Mapping[str, str] = {}
        self._parts = parts
        self._saved_version = state.weight_version if checkpoint else -1
        self._failed_in_a_row = 0
        self._first = ""  # why the first of those failed
        self._seconds = 0.0
        self._score: tuple[int, float] | None = None

    def measured(self, version: int, figures: Mapping[str, float]) -> None:
        """Take what was measured of a weight version; checkpoint.best_metric says what of it counts."""
        name = self._parts.config.checkpoint.best_metric
        if name is not None and name in figures and math.isfinite(figures[name]):
            self._score = (version, float(figures[name]))

    async def save(self, state: RunState, *, needed: bool) -> None:
        """Commit a checkpoint of the present state, unless there is one already.

        Args:
            needed: the run cannot do without it.
        Raises:
            CheckpointError: it failed and is needed, or too many failed before.
        """
        if self._saved_version == state.weight_version or state.weight_version == 0:
            return
        started = time.monotonic()
        try:
            self.checkpoint = await self._commit(state)
        except CheckpointError as error:
            self._survive(error, needed)
            return
        self._failed_in_a_row = 0
        self._saved_version = state.weight_version
        self._seconds = time.monotonic() - started

    def _survive(self, error: CheckpointError, needed: bool) -> None:
        self.failed += 1
        self._failed_in_a_row += 1
        self._first = error.message if self._failed_in_a_row == 1 else self._first
        limit = self._parts.config.checkpoint.max_failed_saves
        if needed:
            raise error
        if self._failed_in_a_row > limit:
            raise CheckpointError(
                f"{self._failed_in_a_row} saves in a row failed, more than checkpoint.max_failed_saves = {limit}; "
                f"{causes(self._first, error.message)}"
            )
        last = self.checkpoint.name if self.checkpoint else "none, training so far would be lost"
        self._parts.display.message(f"SAVE FAILED, training goes on: {error.message}; the newest checkpoint: {last}")

    async def _commit(self, state: RunState) -> Path:
        parts, store = self._parts, self._parts.checkpoints
        for lines in (parts.metrics, parts.ledger):  # a checkpoint never lacks them, also after a power cut
            await asyncio.to_thread(lines.sync)
        name = f"step_{state.weight_version:06d}"
        temporary = store.begin(name)
        try:
            await parts.learner.save(temporary)
            for path in parts.tokenizer_files:
                shutil.copyfile(path, temporary / "policy" / path.name)  # as open as the run, not as its source
            write_json(temporary / "state.json", state_to_json(state))
        except BaseException as error:
            store.discard(temporary)
            if isinstance(error, OSError):
                raise CheckpointError(f"checkpoint {name} could not be written: {error}") from error
            raise
        info: dict[str, Any] = {
            "weight_version": state.weight_version,
            "stage": parts.config.stages[state.stage],
            "inputs": Provenance(
                inputs=parts.fingerprint, extracted=parts.data.extracted(), reference=self.anchor.get("reference")
            ).to_json(),
        }
        metric = parts.config.checkpoint.best_metric
        if self._score and self._score[0] == state.weight_version:
            info["score"] = {"metric": metric, "value": self._score[1]}
        return await asyncio.to_thread(store.commit, temporary, name, info)

    def take_seconds(self) -> float:
        """Seconds of a save since the last call; 0 where there was none."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    # --- policies handed from stage to stage ---

    def hand_over(self, stage: StageName) -> None:
        """Keep the policy a finished stage hands to the next one, as hard links into its checkpoint where it can.

        Raises:
            CheckpointError: it cannot be written. The stage is saved, so the same command tries again.
        """
        assert self.checkpoint is not None  # noqa: S101 - every finished stage has saved one
        target = self.handed(stage)
        temporary = target.with_name(f".{stage}")  # under its name it is complete
        for folder in (target, temporary):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            for path in sorted((self.checkpoint / "policy").iterdir()):
                _link(path, temporary / path.name)
                fsync(temporary / path.name)
            fsync(temporary)
            temporary.rename(target)
            for folder in (target.parent, target.parent.parent):  # `stages` may be new
                fsync(folder)
        except OSError as error:
            raise CheckpointError(
                f"{target} could not be written: {error}; free disk space, or check the folder of run.dir. "
                f"{self.checkpoint.name} is saved, the same command continues"
            ) from error

    def handed(self, stage: StageName) -> Path:
        """The folder of the policy that a stage hands over."""
        return RunDirectory(self._parts.run_dir).exported_policy(stage)

    def policy(self) -> Path:
        """The newest policy: that of the newest checkpoint, or the initial one."""
        return self.checkpoint / "policy" if self.checkpoint else self._parts.model

    def reference(self, stage: int) -> Path:
        """The policy that a stage, by index, began with: what the stage before handed over, or the initial one."""
        before = [plan.name for plan in stage_plans(self._parts.config)[:stage] if plan.trains]
        return self.handed(before[-1]) if before else self._parts.model

    def digest(self, policy: Path) -> str:
        """Raises CheckpointError where the folder of a policy cannot be read."""
        try:
            return self._parts.policy_digest(policy)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{policy}: the policy cannot be read: {error}; restore the folder") from error


def _link(path: Path, target: Path) -> None:
    try:
        target.hardlink_to(path)
    except OSError:  # some network file systems have no hard links
        shutil.copyfile(path, target)
