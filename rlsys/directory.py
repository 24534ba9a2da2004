"""Define every path of a run directory in one place.

    config.yaml           the resolved config
    config.until_N.yaml   the config of the steps up to weight version N, if it was changed there
    model/, model.sha256  the initial model of model.from_scratch, and the digest of its settings
    metrics.jsonl         one row for each training step
    ledger.jsonl          the outcome of every prompt
    rollouts/             some completions of each online step, see rlsys.run.rollouts
    tensorboard/          the same metrics for TensorBoard
    trackers/NAME.json    the run of an experiment tracker, and the last row that it got
    checkpoints/step_N/   checkpoints; see rlsys.run.checkpoints
    resumed_from.json     the checkpoint, named by run.resume, with which this run began
    stages/NAME/          the exported policy of a stage; for the stage `search`, a search directory
    stages/NAME.references.json   scores of preference pairs under the policy that the stage began with
    logs/                 one file for each process
    heartbeat.json        what the driver and its processes did last, and how the command ended
    lock                  held by the process that uses the directory

A checkpoint has these parts, beside its manifest and its provenance:

    state.json                    position and counters of the run
    policy/, learner/             the policy as a model folder; optimizer state and generators
    critic/, critic_learner/      the same of the critic, if the stage has one

A search directory is the run directory of `rlsys search` or the folder of the stage `search`:

    trees/00000.jsonl     finished trees, in the order of the prompts
    trees/.open/130.json  a finished tree whose shard is not complete
    search.json           config values and digests that determine the trees
    summary.json          figures of `rlsys search`
    scores.jsonl          scores of its correct chains by `rlsys score`
    marks.json            chains that a person marked as bad, see rlsys.search.marks
    data/                 the extracted tables, report.json and README.md
    stage.json            the request to the stage `search`, and its figures
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlsys.types import StageName

REPORT = "report.json"
CARD = "README.md"  # of the extracted tables, as the Hugging Face hub has it
"""Name of the file with the figures of an extraction, in the folder of its tables."""


@dataclass(frozen=True, slots=True)
class CheckpointDirectory:
    """Paths of a checkpoint."""

    path: Path

    @property
    def state(self) -> Path:
        return self.path / "state.json"

    @property
    def policy(self) -> Path:
        return self.path / "policy"

    @property
    def learner(self) -> Path:
        return self.path / "learner"

    @property
    def critic(self) -> Path:
        return self.path / "critic"

    @property
    def critic_learner(self) -> Path:
        return self.path / "critic_learner"


@dataclass(frozen=True, slots=True)
class SearchDirectory:
    """Paths of the trees of a search and of the data extracted from them."""

    path: Path

    @property
    def trees(self) -> Path:
        return self.path / "trees"

    @property
    def open_trees(self) -> Path:
        return self.trees / ".open"

    @property
    def origin(self) -> Path:
        return self.path / "search.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def scores(self) -> Path:
        return self.path / "scores.jsonl"

    @property
    def marks(self) -> Path:
        return self.path / "marks.json"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def report(self) -> Path:
        return self.data / REPORT

    @property
    def stage_record(self) -> Path:
        return self.path / "stage.json"


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths of a training run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    def config_until(self, version: int) -> Path:
        """Return the path of the config that was in use until a weight version, and was changed then."""
        return self.path / f"config.until_{version:06d}.yaml"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def model_digest(self) -> Path:
        return self.path / "model.sha256"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def trackers(self) -> Path:
        return self.path / "trackers"

    def tracker_state(self, name: str) -> Path:
        """Return the file about the run of an experiment tracker."""
        return self.trackers / f"{name}.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def resumed_from(self) -> Path:
        return self.path / "resumed_from.json"

    @property
    def stages(self) -> Path:
        return self.path / "stages"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def driver_log(self) -> Path:
        return self.logs / "driver.log"

    @property
    def heartbeat(self) -> Path:
        return self.path / "heartbeat.json"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def search_stage(self) -> SearchDirectory:
        """Trees and data of the stage `search`."""
        return SearchDirectory(self.stages / "search")

    def exported_policy(self, stage: StageName) -> Path:
        """Return the folder of the policy that a finished stage has exported."""
        return self.stages / stage

    def reference_scores(self, stage: StageName) -> Path:
        """Return the file with a stage's scores of preference pairs under its reference policy."""
        return self.stages / f"{stage}.references.json"
