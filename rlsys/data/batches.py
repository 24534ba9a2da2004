"""What a training step learns from beside the groups of its rollouts: the same step always gets the same rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsys.config.schema import Config, StageName
from rlsys.data.demonstrations import DemonstrationStream, Epochs
from rlsys.data.rows import PairRows, Reader, SupervisedRows
from rlsys.errors import ConfigError, DataError
from rlsys.tables.write import REPORT
from rlsys.types import Demonstration, Preference, TrainingBatch

DATA = "data"
DONE = "stage.json"
SEARCHED = "stage search:"
"""What errors of files name that the stage `search` has written, in place of a config field."""


def search_folder(run_dir: Path) -> Path:
    """Where the stage `search` keeps its trees, in data/ what it has extracted, and in stage.json what it was asked."""
    return run_dir / "stages" / "search"


def asked_of_search(config: Config, prompts: int) -> dict[str, Any]:
    """What may change without another tree for the same prompt. prompts: for how many there are trees."""
    return {"prompts": prompts, "extract": config.extract.model_dump(mode="json")}


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
        self._extracted: dict[str, str] = {}
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
        if stage == "preference" or (stage == "online" and self._config.pairs_online):
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

    def extracted(self) -> dict[str, str]:
        """Of what the stage `search` has extracted and a stage has read: names and digests, by the key of a path."""
        return dict(self._extracted)

    def check_extracted(self, trained: Mapping[str, str], checkpoint: Path) -> None:
        """Compare `extracted` with what it was when the stage that a checkpoint is of had read it.

        Raises:
            ConfigError: it differs: another table, or other rows.
        """
        for name, now in self._extracted.items():
            before = trained.get(name, SEARCHED)
            if before in (SEARCHED, now):  # the stage before had not read it yet
                continue
            table = before.removeprefix(f"{SEARCHED} ").split(" ")[0]
            if name == "preference.path" and table != self._pair_table:
                pairs = "chains" if table == "preferences" else "steps"
                raise ConfigError(
                    f"objective.preference.pairs: {checkpoint} was trained on {pairs}, found "
                    f"{self._config.objective.preference.pairs}; set it back, or start a new run.dir"
                )
            raise ConfigError(
                f"{self._searched / table}.parquet: the rows differ from those that {checkpoint} was trained with; put "
                "them back, or start a new run.dir"
            )

    @property
    def _pair_table(self) -> str:
        return "preferences" if self._config.objective.preference.pairs == "chains" else "step_preferences"

    def rows(self) -> SupervisedRows:
        """Of the stage sft."""
        if self._rows is None:
            path = self._config.sft.path
            if path is None:
                with _report_named(self._searched):
                    self._rows = self._reader.supervised(str(self._searched / "supervised.parquet"), SEARCHED)
                self._extracted["sft.path"] = f"{SEARCHED} supervised {self._rows.digest()}"
            else:
                self._rows = self._reader.supervised(path, "sft.path")
        return self._rows

    def pairs(self) -> PairRows:
        """Of the stage preference, and of the online stage where its pairs are of a file."""
        if self._pairs is None:
            path = self._config.preference.path
            if path is None:
                with _report_named(self._searched):
                    self._pairs = self._reader.pairs(str(self._searched / f"{self._pair_table}.parquet"), SEARCHED)
                self._extracted["preference.path"] = f"{SEARCHED} {self._pair_table} {self._pairs.digest()}"
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
        if stage == "preference" or (stage == "online" and self._config.pairs_online):
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


def taken_by_step(config: Config, stage: StageName) -> dict[str, int]:
    """How many rows and pairs a step of a stage takes of data that have an order, by the field that says so."""
    demonstrations, pairs = config.objective.sft.rows_per_step, config.preference.pairs_per_step
    taken: dict[StageName, dict[str, int]] = {
        "warm_start": {"warm_start.rows_per_step": config.warm_start.rows_per_step},
        "sft": {"sft.rows_per_step": config.sft.rows_per_step},
        "preference": {"preference.pairs_per_step": pairs},
        "online": {
            **({"objective.sft.rows_per_step": demonstrations} if "online" in imitates(config) else {}),
            **({"preference.pairs_per_step": pairs} if config.pairs_online else {}),
        },
    }
    return taken.get(stage, {})


def uses_pairs(config: Config) -> bool:
    return "preference" in config.stages or config.pairs_online


def reads_extracted(config: Config, stage: StageName) -> bool:
    """Whether a stage trains on what the stage `search` has extracted."""
    if stage == "sft":
        return not config.sft.path
    paired = stage == "preference" or (stage == "online" and config.pairs_online)
    return paired and not config.preference.path


def needs_references(config: Config, stage: StageName) -> bool:
    """Whether a stage compares the pairs of a file with what a reference policy says of them."""
    paired = stage == "preference" or (stage == "online" and config.pairs_online)
    return paired and config.objective.preference.used
