"""Saves the checkpoints of a run, and tolerates saves that fail."""

from __future__ import annotations

import asyncio
import difflib
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rlsys.config.schema import Config
from rlsys.control.budgets import causes
from rlsys.directory import CheckpointDirectory
from rlsys.errors import CheckpointError, ConfigError
from rlsys.files import write_json
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.metrics import METRICS, spec_of
from rlsys.run.provenance import Provenance
from rlsys.run.state import state_to_json
from rlsys.types import RunState


def check_best_metric(config: Config) -> None:
    """Raise ConfigError if checkpoint.best_metric is not the name of a metric."""
    name = config.checkpoint.best_metric
    if name is not None and spec_of(name) is None:
        near = difflib.get_close_matches(name, METRICS, 1)
        raise ConfigError(
            f"checkpoint.best_metric: expected null or the name of a metric (docs/metrics.md), found {name!r}"
            + (f"; did you mean {near[0]}?" if near else "")
        )


class Savable(Protocol):
    """A learner that can write its state into a folder."""

    async def save(self, folder: Path) -> None: ...


class SyncedFile(Protocol):
    """A file of the run directory that is flushed to disk before a checkpoint is committed."""

    def sync(self) -> None: ...


@dataclass(kw_only=True)
class Checkpointing:
    """The saves of a run, and its newest checkpoint.

    A failed save leaves the earlier checkpoints as they are. If the save was not needed, the run goes on, for at most
    checkpoint.max_failed_saves failures in a row.

    Attributes:
        logs: files to flush to disk before every checkpoint.
        tokenizer_files: files to copy into the policy of every checkpoint.
        provenance: returns the provenance of the present policy.
        say: takes a message about every failed save.
        checkpoint: the newest checkpoint.
        saved_version: the weight version of the newest checkpoint; -1 for none.
        failed: failed saves since the command began.
    """

    config: Config
    store: CheckpointStore
    learner: Savable
    logs: Sequence[SyncedFile]
    tokenizer_files: Sequence[Path]
    provenance: Callable[[], Provenance]
    say: Callable[[str], None]
    checkpoint: Path | None
    saved_version: int
    failed: int = 0
    _failed_in_a_row: int = 0
    _first_failure: str = ""
    _seconds: float = 0.0
    _score: tuple[int, float] | None = field(default=None)

    def note_metrics(self, version: int, metrics: Mapping[str, float]) -> None:
        """Keep the value of checkpoint.best_metric for a weight version, if it was measured."""
        name = self.config.checkpoint.best_metric
        if name is not None and name in metrics and math.isfinite(metrics[name]):
            self._score = (version, float(metrics[name]))

    async def save(self, state: RunState, *, needed: bool) -> None:
        """Commit a checkpoint of the present state, unless one exists.

        Args:
            needed: whether the run cannot go on without the checkpoint.
        Raises:
            CheckpointError: the save failed and is needed, or too many failed in a row.
        """
        if self.saved_version == state.weight_version or state.weight_version == 0:
            return
        started = time.monotonic()
        try:
            self.checkpoint = await self._commit(state)
        except CheckpointError as error:
            self._tolerate(error, needed)
            return
        self._failed_in_a_row = 0
        self.saved_version = state.weight_version
        self._seconds = time.monotonic() - started

    def _tolerate(self, error: CheckpointError, needed: bool) -> None:
        self.failed += 1
        self._failed_in_a_row += 1
        if self._failed_in_a_row == 1:
            self._first_failure = error.message
        limit = self.config.checkpoint.max_failed_saves
        if needed:
            raise error
        if self._failed_in_a_row > limit:
            raise CheckpointError(
                f"{self._failed_in_a_row} saves in a row failed, more than checkpoint.max_failed_saves = {limit}; "
                f"{causes(self._first_failure, error.message)}"
            )
        newest = self.checkpoint.name if self.checkpoint else "none, training so far would be lost"
        self.say(f"SAVE FAILED, training goes on: {error.message}; the newest checkpoint: {newest}")

    async def _commit(self, state: RunState) -> Path:
        for log in self.logs:  # on disk before the checkpoint, also after a power cut
            await asyncio.to_thread(log.sync)
        name = f"step_{state.weight_version:06d}"
        temporary = self.store.begin(name)
        parts = CheckpointDirectory(temporary)
        try:
            await self.learner.save(temporary)
            for path in self.tokenizer_files:
                shutil.copyfile(path, parts.policy / path.name)  # with the permissions of the run directory
            write_json(parts.state, state_to_json(state))
        except BaseException as error:
            self.store.discard(temporary)
            if isinstance(error, OSError):
                raise CheckpointError(f"checkpoint {name} could not be written: {error}") from error
            raise
        return await asyncio.to_thread(self.store.commit, temporary, name, self._info(state))

    def _info(self, state: RunState) -> dict[str, Any]:
        """Return the facts that the manifest of a checkpoint keeps."""
        info: dict[str, Any] = {
            "weight_version": state.weight_version,
            "stage": self.config.stages[state.stage],
            "inputs": self.provenance().to_json(),
        }
        if self._score and self._score[0] == state.weight_version:
            info["score"] = {"metric": self.config.checkpoint.best_metric, "value": self._score[1]}
        return info

    def take_seconds(self) -> float:
        """Return the seconds of the last save, or 0 if there was none since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
