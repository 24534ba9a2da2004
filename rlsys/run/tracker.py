"""Send the rows of metrics.jsonl to an experiment tracker, as a process of its own beside the driver.

    python -m rlsys.run.tracker NAME RUN_DIR

The process reads the rows from the file, so a tracker that is slow, blocks or crashes cannot touch the run. It ends
when its standard input is closed, which also happens when the driver is killed, and then has FINISH_S seconds left.
`trackers/NAME.json` keeps the id of the tracker's run and the last row that was sent: a resumed run continues the same
run of the tracker, and a row is never sent twice, also not after a rollback.

Lines on standard output are messages for the user.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from rlsys.config.files import flat_fields, load_config
from rlsys.config.schema import Config
from rlsys.directory import RunDirectory
from rlsys.errors import RlsysError
from rlsys.files import read_json, write_json
from rlsys.processes import quiet_worker
from rlsys.run.metrics import spec_of

POLL_S = 1.0
FINISH_S = 60.0  # to send what is left after the end of the run
PROJECT = "rlsys"
_LONGEST_PARAMETER = 500  # characters of a value; stores of MLflow refuse longer ones


@dataclass(slots=True)
class Sent:
    """The rows that a tracker has got so far.

    Attributes:
        id: the tracker's run.
        version: weight version of the last row; -1 before the first.
        rows: stage and step of the rows of this version.
        failures: rows that the tracker refused.
    """

    id: str = ""
    version: int = -1
    rows: list[list[Any]] = field(default_factory=list)
    failures: int = 0

    def is_new(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row is still to be sent."""
        version = row["weights/version"]
        return version > self.version or (version == self.version and [row["stage"], row["step"]] not in self.rows)

    def note(self, row: Mapping[str, Any]) -> None:
        """Count a row as sent."""
        if row["weights/version"] > self.version:
            self.version, self.rows = row["weights/version"], []
        self.rows.append([row["stage"], row["step"]])


class Tracker(Protocol):
    """A run of an experiment tracker."""

    id: str

    def log(self, version: int, metrics: Mapping[str, float]) -> None:
        """Add metrics at a weight version."""
        ...

    def finish(self) -> None:
        """Send everything and end."""
        ...


class Wandb:
    """A run of Weights & Biases. WANDB_PROJECT, WANDB_MODE, WANDB_DIR and its other variables are respected."""

    def __init__(self, config: Config, run_dir: Path, run_id: str) -> None:
        wandb = import_module("wandb")
        self.id = run_id or os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run_dir.name),
            id=self.id,
            resume="allow",
            dir=os.environ.get("WANDB_DIR", str(RunDirectory(run_dir).trackers)),
        )
        self._run.config.update(config.model_dump(mode="json"), allow_val_change=True)

    def log(self, version: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, "weights/version": version}, step=version)

    def finish(self) -> None:
        self._run.finish()


class Mlflow:
    """A run of MLflow. MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and its other variables are respected."""

    def __init__(self, config: Config, run_dir: Path, run_id: str) -> None:
        self._mlflow = import_module("mlflow")
        if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & set(os.environ):
            self._mlflow.set_experiment(PROJECT)
        if run_id:
            self.id = self._mlflow.start_run(run_id=run_id).info.run_id
            return
        self.id = self._mlflow.start_run(run_name=run_dir.name).info.run_id
        fields = {
            name: value for name, value in flat_fields(config.model_dump(mode="json")).items() if value is not None
        }
        self._mlflow.log_params({name: str(value)[:_LONGEST_PARAMETER] for name, value in fields.items()})

    def log(self, version: int, metrics: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(metrics), step=version, synchronous=True)

    def finish(self) -> None:
        self._mlflow.end_run()


class Trackio:
    """A run of trackio. TRACKIO_PROJECT, TRACKIO_DIR, TRACKIO_SPACE_ID and its other variables are respected."""

    def __init__(self, config: Config, run_dir: Path, run_id: str) -> None:
        self._trackio = import_module("trackio")
        self.id = run_id or f"{run_dir.name}-{uuid.uuid4().hex[:4]}"  # trackio knows a run by its name
        self._trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=self.id,
            resume="allow",
            config=flat_fields(config.model_dump(mode="json")),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, version: int, metrics: Mapping[str, float]) -> None:
        self._trackio.log(dict(metrics), step=version)

    def finish(self) -> None:
        self._trackio.finish()


OPENERS: Mapping[str, Callable[[Config, Path, str], Tracker]] = {"wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}


class Follower:
    """The process's work: send the rows of a run to one tracker.

    Args:
        name: name of the tracker.
        say: takes messages for the user.
    """

    def __init__(self, name: str, run_dir: Path, say: Callable[[str], None]) -> None:
        self._name, self._run_dir, self._say = name, run_dir, say
        self._state = RunDirectory(run_dir).tracker_state(name)
        self._inode, self._offset = 0, 0  # of metrics.jsonl, up to where it was read
        self.sent = Sent(**read_json(self._state)) if self._state.exists() else Sent()

    def open(self) -> Tracker:
        """Begin or continue the tracker's run."""
        config = load_config(RunDirectory(self._run_dir).config)
        self._state.parent.mkdir(exist_ok=True)
        tracker = OPENERS[self._name](config, self._run_dir, self.sent.id)
        self.sent.id = tracker.id
        self._save()
        return tracker

    def send_new_rows(self, tracker: Tracker) -> None:
        """Send all rows that the tracker has not got."""
        rows = [row for row in self._read_rows() if self.sent.is_new(row)]
        for row in rows:
            metrics = {name: value for name, value in row.items() if spec_of(name) and value is not None}
            try:
                tracker.log(row["weights/version"], metrics)
            except Exception as error:  # noqa: BLE001 - a tracker may raise anything; the row is counted as refused
                self._refused(error)
            self.sent.note(row)
        if rows:
            self._save()

    def _read_rows(self) -> list[dict[str, Any]]:
        """Return the complete rows that were not read yet; all rows of a file that a resume replaced."""
        try:
            with RunDirectory(self._run_dir).metrics.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self._inode, self._offset = inode, 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def _refused(self, error: Exception) -> None:
        self.sent.failures += 1
        if self.sent.failures == 1:
            self._say(f"a row was refused: {one_line(error)}; later ones are counted in {self._state}")

    def _save(self) -> None:
        write_json(self._state, asdict(self.sent))


def one_line(error: BaseException) -> str:
    """Return the type and the first 300 characters of the message of an error."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def main(name: str, run_dir: Path) -> int:
    """Follow a run until standard input ends. Return the exit code."""
    for each in (signal.SIGINT, signal.SIGTERM):  # the end of standard input ends this process
        signal.signal(each, signal.SIG_IGN)
    messages = os.fdopen(os.dup(1), "w", buffering=1)
    quiet_worker(str(RunDirectory(run_dir).logs / f"tracker-{name}.log"))
    threading.Thread(target=_limit_the_end, daemon=True).start()

    def say(text: str) -> None:
        print(text, file=messages)

    try:
        follower = Follower(name, run_dir, say)
        tracker = follower.open()
        ended = False
        while not ended:
            ended = bool(select.select([sys.stdin], [], [], POLL_S)[0])
            follower.send_new_rows(tracker)
        tracker.finish()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a tracker may raise anything; the run goes on
        say(f"{error.message if isinstance(error, RlsysError) else one_line(error)}; the run goes on without it")
        return 1
    return 0


def _limit_the_end() -> None:
    """End this process some time after the end of the run, even if the tracker blocks."""
    select.select([sys.stdin], [], [])
    threading.Event().wait(FINISH_S)
    os._exit(1)


if __name__ == "__main__":
    code = main(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(code)  # threads that a tracker left behind do not delay the end
