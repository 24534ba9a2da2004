"""One job in a storm: `rlsys train`, restarted until its exit code is 0, and the faults injected into it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
from storm_figures import Seen, training_steps
from storm_plan import DAMAGED, DISK_FULL, ENDS_DRIVER, Fault, Injection
from storm_processes import (
    MARK,
    RUN_ID,
    flip_a_bit,
    is_gone,
    kill_and_wait,
    limit_files,
    line,
    marked,
    running,
    saved_version,
    status,
    valid_checkpoints,
)

from rlsys.run.metrics import read_rows

ROOT = Path(__file__).resolve().parents[1]
# Interval of the checks; time until leftovers of a driver are orphans; limits for a driver to end, and for a fault to
# get a target.
LOOK_S, GONE_S, STOP_LIMIT_S, READY_LIMIT_S = 0.2, 15.0, 150.0, 120.0
KILL_LIMIT_S = 10.0  # limit for killed processes to be gone
FULL_BYTES, FULL_S = 1 << 16, 60.0  # largest file on the full disk, and the longest time that it stays full
ENDS_IN_A_ROW = 3  # a job ends after so many starts in a row that end without a fault and without a completed step
LEARNER_LOST = "the learner was lost as well"  # message of a driver that got a stop request
# Messages of the driver about a failed save and about a damaged checkpoint.
SAVE_FAILED, PASSED_OVER = "SAVE FAILED", "checkpoint skipped: "
# The timeline repeats lines of the driver that have one of these words.
TOLD = (SAVE_FAILED, "SKIPPED", "skipped", "lost", "could not", "error", "stopped", "resum")


@dataclass(slots=True)
class Start:
    """One process of the driver.

    Attributes:
        asked: The fault that is to end it; "" without one.
        steps: Number of rows of training steps that it has written.
        told: Number of lines of its log that were read.
    """

    process: subprocess.Popen[bytes]
    mark: str
    log: Path
    asked: str = ""
    steps: int = 0
    failed_saves: int = 0
    told: int = 0
    ended_at: float = 0.0
    audited: bool = False


class JobStorm:
    """Runs one job in a storm.

    Args:
        job: Number of the job.
        run_dir: A new folder whose name no other run has.
        config: The config file.
        overrides: Overrides of the config.
        environment: Variables of the driver in addition to those of this process.
        began: Start of the whole storm on the monotonic clock.
        tell: Called with the seconds since the start of the storm and an event.
    """

    def __init__(
        self,
        job: int,
        run_dir: Path,
        config: Path,
        overrides: Sequence[str],
        environment: Mapping[str, str],
        began: float,
        tell: Callable[[float, str], None],
    ) -> None:
        self.job, self.run_dir = job, run_dir
        self.faults: list[Fault] = []
        self.starts: list[Start] = []
        self.unasked: list[str] = []  # ends of the driver that no fault caused
        self.orphans: list[str] = []
        self.problems: list[str] = []
        self.rows = Seen()
        self.finished = self.given_up = False
        self.ended_at = 0.0  # on the monotonic clock
        self._command = [sys.executable, "-m", "rlsys.cli", "train", str(config), f"run.dir={run_dir}", *overrides]
        self._environment = {**os.environ, "COLUMNS": "400", **environment}  # so that lines of the log are not wrapped
        self._began, self._tell = began, tell
        self._targets: dict[int, psutil.Process] = {}  # by fault, while they exist
        self._damaged: dict[str, Fault] = {}  # by checkpoint, until the next start names it
        self._file = (0, 0, 0)

    def run(self, plan: Iterable[Injection], deadline: float) -> None:
        """Run the job until it is finished, or given up at `deadline`. No process of it is left afterwards."""
        self._deadline = deadline
        try:
            self._start()
            for injection in plan:
                self._wait(injection.wait_s)
                if self._wait(READY_LIMIT_S, partial(self._ready, injection.kind)):
                    self._inject(injection)
                if self._over:
                    break
            self.ended_at = self._last.ended_at
            self._audit(wait=True)
            self._look_at_targets()
        finally:
            kill_and_wait(self._left(), KILL_LIMIT_S)

    @property
    def stuck(self) -> list[Fault]:
        """Faults whose process was never gone before the job ended."""
        return [self.faults[number] for number in self._targets]

    # --- the driver ---

    @property
    def _over(self) -> bool:
        return self.finished or self.given_up

    @property
    def _last(self) -> Start:
        return self.starts[-1]

    def _start(self) -> None:
        number = len(self.starts)
        mark = f"{self.run_dir.name}.{number}"
        log = self.run_dir.with_name(f"{mark}.log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                self._command,
                env={**self._environment, MARK: mark},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.starts.append(Start(process, mark, log))
        self._say(f"start {number} of the driver, process {process.pid}")

    def _say(self, what: str) -> None:
        self._tell(time.monotonic() - self._began, what)

    def _wait(self, seconds: float, until: Callable[[], bool] = lambda: False, again: bool = True) -> bool:
        """Watch the job until a condition holds or the time is over. Return whether the condition holds.

        Args:
            seconds: The longest wait.
            until: The condition.
            again: Whether to restart a driver that has ended.
        """
        limit = time.monotonic() + seconds
        while True:
            self._look(again)
            if self._over or (found := until()):
                return not self._over and found
            if time.monotonic() > limit:
                return False
            time.sleep(LOOK_S)

    def _look(self, again: bool = True) -> None:
        self._look_at_files()
        self._look_at_targets()
        code = self._last.process.poll()
        if code is not None and not self._last.ended_at:
            self._ended(code)
        if time.monotonic() > self._deadline and not self._over:
            self._give_up("the time was over")
        if code is not None and again and not self._over:
            self._start()
        self._audit()

    def _look_at_targets(self) -> None:
        for number, process in list(self._targets.items()):
            if is_gone(process):
                self.faults[number].gone_s = self._since(self.faults[number])
                del self._targets[number]

    def _since(self, fault: Fault) -> float:
        return time.monotonic() - self._began - fault.at_s

    def _look_at_files(self) -> None:
        """Read new rows of training steps and new lines of the driver's log."""
        path, start = self.run_dir / "metrics.jsonl", self._last
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            now = (found.st_ino, found.st_size, found.st_mtime_ns)
            if now != self._file:
                self._file = now
                new = len(training_steps(self.rows.add(path.read_text(encoding="utf-8"))))
                start.steps += new
                for fault in self.faults if new else ():
                    if fault.next_step_s is None:
                        fault.next_step_s = self._since(fault)
        lines = start.log.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        for said in lines[start.told :]:
            start.failed_saves += SAVE_FAILED in said
            for name in [name for name in self._damaged if PASSED_OVER in said and name in said]:
                self._damaged.pop(name).took_effect = True
            if any(word in said for word in TOLD):
                self._say(f"  driver: {said.strip()[:300]}")
        start.told = len(lines)

    def _ended(self, code: int) -> None:
        """Record the end of a driver, and decide whether the job is finished or given up."""
        self._look_at_files()
        start = self._last
        start.ended_at = time.monotonic()
        words = start.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        end = f"exit code {code}, {words[-1].strip()[:300] if words else 'no output'}"
        self._say(f"the driver ended: {end}")
        for name in self._damaged:
            self.problems.append(f"{DAMAGED}: start {len(self.starts) - 1} of the driver did not name {name}")
        self._damaged.clear()
        if code == 0:
            self.finished = True
        elif not start.asked:
            self.unasked.append(f"start {len(self.starts) - 1}: {end}")
            last = self.starts[-ENDS_IN_A_ROW:]
            if len(last) == ENDS_IN_A_ROW and not any(each.asked or each.steps for each in last):
                self._give_up(f"{ENDS_IN_A_ROW} starts in a row made no step")
        if code == 2:
            self._give_up("the command was refused")

    def _give_up(self, why: str) -> None:
        self.given_up = True
        self.problems.append(f"given up: {why}")
        self._say(f"given up: {why}")
        self._kill_driver()
        self._last.ended_at = self._last.ended_at or time.monotonic()

    def _kill_driver(self) -> None:
        if self._last.process.poll() is None:
            self._last.process.kill()
            self._last.process.wait()

    def _audit(self, wait: bool = False) -> None:
        """Report processes of an ended driver that still exist GONE_S later as orphans.

        Args:
            wait: Whether to wait this long for the last driver, and then report all processes of the job, including
                reward workers, which carry no mark of a driver.
        """
        if wait:
            while (left := self._left()) and time.monotonic() - self._last.ended_at < GONE_S:
                time.sleep(LOOK_S)
            self._bury(left)
            return
        for start in self.starts:
            if start.ended_at and not start.audited and time.monotonic() - start.ended_at > GONE_S:
                start.audited = True
                self._bury(marked(MARK, start.mark))

    def _left(self) -> list[psutil.Process]:
        """Return all processes of the job, each once, although most carry both marks."""
        found = [*marked(MARK, self.run_dir.name), *marked(RUN_ID, self.run_dir.name)]
        return list({process.pid: process for process in found}.values())

    def _bury(self, orphans: Iterable[psutil.Process]) -> None:
        for process in orphans:
            with contextlib.suppress(psutil.NoSuchProcess):
                found = f"process {process.pid} {line(process)[:200]} ({status(process)})"
                process.kill()  # raises if the process has ended in the meantime, which is not an orphan
                self.orphans.append(found)
                self._say(f"orphan: {found}")

    # --- faults ---

    def _ready(self, kind: str) -> bool:
        """Return whether a fault can be injected now."""
        start = self._last
        if start.process.poll() is not None:
            return False
        if kind in ENDS_DRIVER:  # only after a completed step, so that every start makes progress
            return start.steps > 0 and (kind != DAMAGED or len(valid_checkpoints(self.run_dir)) > 1)
        return bool(running("rank" if kind == DISK_FULL else kind.partition(" ")[2], start.mark))

    def _inject(self, injection: Injection) -> None:
        kind = injection.kind
        if kind in ENDS_DRIVER:
            self._end_driver(kind)
            if kind == DAMAGED:
                self._damage(injection.draw)
        elif kind == DISK_FULL:
            self._fill_disk()
        else:
            number, _, what = kind.partition(" ")
            found = running(what, self._last.mark)
            if found:  # it may have ended since the last check
                process = found[injection.pick(len(found))]
                self._note(kind, f"process {process.pid} {line(process)[:60]}")
                self._targets[len(self.faults) - 1] = process
                try:
                    process.send_signal(signal.Signals[number])
                except psutil.NoSuchProcess:
                    self.faults[-1].took_effect = False

    def _note(self, kind: str, target: str) -> Fault:
        self.faults.append(Fault(self.job, time.monotonic() - self._began, kind, target))
        self._say(f"{kind}: {target}")
        return self.faults[-1]

    def _end_driver(self, kind: str) -> None:
        start = self._last
        number = signal.SIGKILL if kind == DAMAGED else signal.Signals[kind.partition(" ")[0]]
        fault = self._note(kind, f"process {start.process.pid}")
        start.asked = kind
        start.process.send_signal(number)
        self._wait(STOP_LIMIT_S, lambda: bool(start.ended_at), again=False)
        if not start.ended_at:
            self.problems.append(f"{kind}: the driver did not end within {STOP_LIMIT_S:.0f} s")
            self._kill_driver()
        code = start.process.returncode
        fault.gone_s, fault.followed, fault.took_effect = self._since(fault), f"exit code {code}", code != 0
        ends = (0, -number if number == signal.SIGKILL else 128 + number)  # 0 if it had just made its last step
        if code not in ends and not self._over:
            self.problems.append(f"{kind}: exit code {code}")
        words = start.log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        if code == 128 + number and LEARNER_LOST not in words:  # the message names the lost steps
            made, saved = read_rows(self.run_dir / "metrics.jsonl")[-1]["weights/version"], saved_version(self.run_dir)
            if made != saved:
                self.problems.append(f"{kind}: its last step made version {made}, its last checkpoint has {saved}")

    def _damage(self, draw: float) -> None:
        fault = self.faults[-1]
        fault.took_effect = False  # until the next start has named it
        if not self._over:
            newest = valid_checkpoints(self.run_dir)[-1]
            self._damaged[newest.name] = fault
            place = flip_a_bit(newest, draw)
            fault.followed += f", {place} flipped"
            self._say(f"  {place} flipped")

    def _fill_disk(self) -> None:
        """Let no rank write more than FULL_BYTES into a file until a save has failed."""
        start = self._last
        ranks, before = running("rank", start.mark), start.failed_saves
        fault = self._note(DISK_FULL, f"processes {[rank.pid for rank in ranks]}")
        start.asked = DISK_FULL  # at the end of a stage, a full disk ends the run
        limit_files(ranks, FULL_BYTES)
        self._wait(FULL_S, lambda: start.failed_saves > before or bool(start.ended_at), again=False)
        limit_files(ranks, -1)
        self._say(f"  space again after {self._since(fault):.1f} s")
        steps = start.steps  # at the end of a stage, the next required save has begun by now
        self._wait(STOP_LIMIT_S, lambda: start.steps > steps or bool(start.ended_at), again=False)
        failed = start.failed_saves - before
        fault.took_effect = failed > 0 or bool(start.process.returncode)  # a required save that fails ends the driver
        fault.followed = "the driver ended" if start.ended_at else f"{failed} saves failed, and training went on"
        self._say(f"  {fault.followed}")
        if not start.ended_at:
            start.asked = ""
