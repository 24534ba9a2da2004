"""What a training step learns from beside the groups of its rollouts: the same step always gets the same rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlsys.config import Config, StageName
from rlsys.data_files import REPORT
from rlsys.demonstrations import DemonstrationStream, Epochs
from rlsys.errors import ConfigError, DataError
from rlsys.training_rows import PairRows, Reader, SupervisedRows
from rlsys.types import Demonstration, Preference, TrainingBatch

DATA = "data"
SEARCHED = "stage search:"
"""What errors of files name that the stage `search` has written, in place of a config field."""


def search_folder(run_dir: Path) -> Path:
    """Where the stage `search` keeps its trees, and in data/ what it has extracted."""
    return run_dir / "stages" / "search"


class TrainingData:
    """Rows and pairs by stage and step. A file is read when it is first needed.

    references: [P, 2], the scores of all pairs under the reference policy, once they are known.

    Args:
        imitated: demonstrations of the stages that use the task's own.
        searched: folder with what the stage `search` has extracted, where sft or preference have no path.
    """

    def __init__(
        self, config: Config, reader: Reader, imitated: dict[StageName, DemonstrationStream], searched: Path
    ) -> None:
        self._config, self._reader = config, reader
        self._imitated, self._searched = imitated, searched
        self._rows: SupervisedRows | None = None
        self._pairs: PairRows | None = None
        self._epochs: dict[str, Epochs] = {}
        self.references: NDArray[np.float64] | None = None

    def check(self) -> None:
        """Read every file that is there before the run, and the task's demonstrations.

        Raises:
            ConfigError, DataError: one cannot be used, or the stage `search` will not write what is needed.
        """
        if self._imitated:
            next(iter(self._imitated.values())).check()
        if "search" in self._config.stages and self._config.search.split == "held_out":
            raise ConfigError(
                "search.split is held_out: the stages after the stage search would train on the problems of the "
                "evaluation; set it to train"
            )
        extract, pairs = self._config.extract, self._config.objective.preference.pairs
        if "sft" in self._config.stages:
            if self._config.sft.path:
                self.rows()
            elif extract.supervised == "none":
                raise ConfigError("stage sft has no data: extract.supervised is none; choose a rule, or set sft.path")
        if uses_pairs(self._config):
            field, wanted = (
                ("chosen", extract.chosen != "none")
                if pairs == "chains"
                else ("step_preferences", extract.step_preferences)
            )
            if self._config.preference.path:
                self.pairs()
            elif not wanted:
                raise ConfigError(
                    f"there are no preference pairs: extract.{field} leaves them out; change it, or set preference.path"
                )

    def load(self, stage: StageName) -> tuple[str, ...]:
        """Read what a stage needs and was not read before; answers with what the user should know of it."""
        before = self.notes
        if stage == "sft":
            self.rows()
        if stage == "preference" or (stage == "online" and pairs_online(self._config)):
            self.pairs()
        return tuple(note for note in self.notes if note not in before)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the files read so far, a line each."""
        found = []
        if self._rows is not None:
            found.append(f"sft: {len(self._rows):,} rows")
        if self._pairs is not None:
            found += [f"preference: {len(self._pairs):,} pairs", *self._pairs.notes]
        return tuple(found)

    def fingerprint(self) -> dict[str, str]:
        """What decides the rows, by the field that names them: digests of files, or that a stage before writes them."""
        found = {}
        if "sft" in self._config.stages:
            found["sft.path"] = self.rows().digest() if self._config.sft.path else SEARCHED
        if uses_pairs(self._config):
            found["preference.path"] = self.pairs().digest() if self._config.preference.path else SEARCHED
        return found

    def rows(self) -> SupervisedRows:
        """Of the stage sft."""
        if self._rows is None:
            path = self._config.sft.path
            if path is None:
                with _report_named(self._searched):
                    self._rows = self._reader.supervised(str(self._searched / "supervised.parquet"), SEARCHED)
            else:
                self._rows = self._reader.supervised(path, "sft.path")
        return self._rows

    def pairs(self) -> PairRows:
        """Of the stage preference, and of the online stage where its pairs are of a file."""
        if self._pairs is None:
            path = self._config.preference.path
            if path is None:
                name = "preferences" if self._config.objective.preference.pairs == "chains" else "step_preferences"
                with _report_named(self._searched):
                    self._pairs = self._reader.pairs(str(self._searched / f"{name}.parquet"), SEARCHED)
            else:
                self._pairs = self._reader.pairs(path, "preference.path")
        return self._pairs

    def batch(self, stage: StageName, step: int) -> TrainingBatch:
        """What a step of a stage, counted from 0, learns from beside its groups."""
        demonstrations: tuple[Demonstration, ...] = ()
        pairs: tuple[Preference, ...] = ()
        if stage in self._imitated:
            demonstrations = tuple(self._imitated[stage].rows(step))
        elif stage == "sft":
            rows = self.rows()
            taken = self._positions("sft", len(rows), step, self._config.sft.rows_per_step)
            demonstrations = tuple(rows.row(number) for number in taken)
        if stage == "preference" or (stage == "online" and pairs_online(self._config)):
            found, references = self.pairs(), self.references
            taken = self._positions("pairs", len(found), step, self._config.preference.pairs_per_step)
            pairs = tuple(found.row(n, None if references is None else references[n]) for n in taken)
        return TrainingBatch(pairs=pairs, demonstrations=demonstrations)

    def _positions(self, name: str, size: int, step: int, count: int) -> list[int]:
        epochs = self._epochs.setdefault(name, Epochs(size, self._config.run.seed))
        return [epochs.position(index) for index in range(step * count, (step + 1) * count)]


@contextlib.contextmanager
def _report_named(folder: Path) -> Iterator[None]:
    """Say in errors where it stands what the trees of the stage `search` gave."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{error.message}; {folder / REPORT} tells what the trees gave") from None


def imitates(config: Config) -> list[StageName]:
    """The stages that use the task's own demonstrations."""
    sft = config.objective.sft
    online: list[StageName] = ["online"] if sft.used and sft.source == "demonstrations" else []
    wanted: list[StageName] = ["warm_start", *online]
    return [stage for stage in wanted if stage in config.stages]


def pairs_online(config: Config) -> bool:
    """Whether the online stage trains on the pairs of the stage preference."""
    preference, sft = config.objective.preference, config.objective.sft
    wanted = preference.used or (sft.used and sft.source == "chosen")
    return "online" in config.stages and preference.source == "file" and wanted


def uses_pairs(config: Config) -> bool:
    return "preference" in config.stages or pairs_online(config)


def needs_references(config: Config, stage: StageName) -> bool:
    """Whether a stage compares the pairs of a file with what a reference policy says of them."""
    paired = stage == "preference" or (stage == "online" and pairs_online(config))
    return paired and config.objective.preference.used
