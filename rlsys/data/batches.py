"""Demonstrations and preference pairs of a training step, from files, the task or the stage `search`.

The same stage and step always get the same rows and pairs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlsys.config.schema import Config
from rlsys.config.stages import SEARCHED, ExtractedTable, StagePlan, stage_plan, stage_plans
from rlsys.data.demonstrations import DemonstrationStream
from rlsys.data.epochs import Epochs
from rlsys.data.rows import PairRows, Reader, SupervisedRows
from rlsys.directory import REPORT
from rlsys.errors import ConfigError, DataError
from rlsys.tables.sources import Part
from rlsys.types import Demonstration, Preference, StageName, TrainingBatch


class TrainingData:
    """Rows and pairs by stage and step. A file is read when it is first needed.

    Args:
        demonstrations: the task's demonstrations, by the stage that uses them.
        extracted: folder into which the stage `search` extracts tables; used if the config names no path.
    Attributes:
        references: [P, 2] scores of all pairs under the reference policy, in nats; None until they are known.
    """

    def __init__(
        self, config: Config, reader: Reader, demonstrations: dict[StageName, DemonstrationStream], extracted: Path
    ) -> None:
        self._config, self._reader = config, reader
        self._demonstrations, self._extracted_folder = demonstrations, extracted
        self._plans = stage_plans(config)
        self._rows: SupervisedRows | None = None
        self._pairs: PairRows | None = None
        self._extracted: dict[str, ExtractedTable] = {}
        self._epochs: dict[str, Epochs] = {}
        self.references: NDArray[np.float64] | None = None

    def check(self) -> None:
        """Read the task's demonstrations and every data file that exists before the run.

        Raises:
            ConfigError, DataError: a file cannot be used, or the stage `search` will not write the data that a later
                stage needs.
        """
        for number, stream in enumerate(streams := list(self._demonstrations.values())):
            if number == 0:
                stream.check()
            else:
                stream.leave_out_as(streams[0])
        if any(plan.loop == "search" for plan in self._plans) and self._config.search.split == "held_out":
            raise ConfigError(
                "search.split is held_out: the stages after the stage search would train on the problems of the "
                "evaluation; set it to train"
            )
        if self._needs("rows"):
            if self._config.sft.path:
                self.rows()
            elif self._config.extract.supervised == "none":
                raise ConfigError("stage sft has no data: extract.supervised is none; choose a rule, or set sft.path")
        if self._needs("pairs"):
            if self._config.preference.path:
                self.pairs()
            else:
                self._check_pairs_extracted()

    def _check_pairs_extracted(self) -> None:
        extract = self._config.extract
        if self._config.objective.preference.pairs == "chains":
            field, extracted = "chosen", extract.chosen != "none"
        else:
            field, extracted = "step_preferences", extract.step_preferences
        if not extracted:
            raise ConfigError(
                f"there are no preference pairs: extract.{field} leaves them out; change it, or set preference.path"
            )

    def _needs(self, kind: str) -> bool:
        return any(plan.source(kind) for plan in self._plans)

    def load(self, stage: StageName) -> tuple[str, ...]:
        """Read the files of a stage that were not read before, and return notes for the user about them."""
        before = self.notes
        plan = self._plan(stage)
        if plan.source("rows"):
            self.rows()
        if plan.source("pairs"):
            self.pairs()
        return tuple(note for note in self.notes if note not in before)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about the files read so far, one line each."""
        notes = list(next((stream.notes for stream in self._demonstrations.values()), ()))
        if self._rows is not None:
            notes += [f"sft: {len(self._rows):,} rows", *self._rows.notes]
        if self._pairs is not None:
            notes += [f"preference: {len(self._pairs):,} pairs", *self._pairs.notes]
        return tuple(notes)

    def fingerprint(self) -> dict[str, str]:
        """Return the digest of each data file, or `SEARCHED` for an extracted table, by path field."""
        digests = {}
        if self._needs("rows"):
            digests["sft.path"] = self.rows().digest() if self._config.sft.path else SEARCHED
        if self._needs("pairs"):
            digests["preference.path"] = self.pairs().digest() if self._config.preference.path else SEARCHED
        return digests

    def demonstrations_digest(self, digest: str) -> str:
        """Return the digest of a task's rows without the demonstrations that were left out."""
        return next((stream.digest(digest) for stream in self._demonstrations.values()), digest)

    def extracted(self) -> dict[str, ExtractedTable]:
        """Return each extracted table that was read, by the path field that it replaces."""
        return dict(self._extracted)

    @property
    def _pair_table(self) -> str:
        return "preferences" if self._config.objective.preference.pairs == "chains" else "step_preferences"

    def rows(self) -> SupervisedRows:
        """Return the supervised rows of the stage `sft`."""
        if self._rows is None:
            path = self._config.sft.path
            if path is None:
                with _naming_report(self._extracted_folder):
                    file = self._extracted_folder / "supervised.parquet"
                    self._rows = self._reader.supervised(str(file), SEARCHED, self._config.sft.max_bad_rows)
                self._extracted["sft.path"] = ExtractedTable(name="supervised", digest=self._rows.digest())
            else:
                sft = self._config.sft
                part = Part(split=sft.split, subset=sft.subset)
                self._rows = self._reader.supervised(path, "sft.path", sft.max_bad_rows, part)
        return self._rows

    def pairs(self) -> PairRows:
        """Return the preference pairs of a file or of the stage `search`."""
        if self._pairs is None:
            path = self._config.preference.path
            if path is None:
                with _naming_report(self._extracted_folder):
                    file = self._extracted_folder / f"{self._pair_table}.parquet"
                    self._pairs = self._reader.pairs(str(file), SEARCHED, self._config.preference.max_bad_rows)
                table = ExtractedTable(name=self._pair_table, digest=self._pairs.digest())
                self._extracted["preference.path"] = table
            else:
                preference = self._config.preference
                part = Part(split=preference.split, subset=preference.subset)
                self._pairs = self._reader.pairs(path, "preference.path", preference.max_bad_rows, part)
        return self._pairs

    def batch(self, stage: StageName, step: int) -> TrainingBatch:
        """Return the rows and pairs of a training step.

        Args:
            step: the training step within the stage, from 0.
        """
        plan = self._plan(stage)
        demonstrations: tuple[Demonstration, ...] = ()
        pairs: tuple[Preference, ...] = ()
        if stage in self._demonstrations:
            demonstrations = tuple(self._demonstrations[stage].rows(step))
        elif source := plan.source("rows"):
            rows = self.rows()
            demonstrations = tuple(rows.row(n) for n in self._positions("sft", len(rows), step, source.per_step))
        if source := plan.source("pairs"):
            all_pairs, references = self.pairs(), self.references
            positions = self._positions("pairs", len(all_pairs), step, source.per_step)
            pairs = tuple(all_pairs.row(n, None if references is None else references[n]) for n in positions)
        return TrainingBatch(pairs=pairs, demonstrations=demonstrations)

    def _plan(self, stage: StageName) -> StagePlan:
        return stage_plan(self._config, stage)

    def _positions(self, name: str, size: int, step: int, count: int) -> list[int]:
        epochs = self._epochs.setdefault(name, Epochs(size, self._config.run.seed))
        return [epochs.position(index) for index in range(step * count, (step + 1) * count)]


@contextlib.contextmanager
def _naming_report(folder: Path) -> Iterator[None]:
    """Add the path of the extraction report to a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{error.message}; see the figures of the extraction in {folder / REPORT}") from None
