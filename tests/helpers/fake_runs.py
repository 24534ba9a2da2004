"""A controller over fakes in a run directory."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

from fakes import PROBE, FakeLearner, FakePool, NumberTask, prompt
from rich.console import Console

from rlsys.config.files import parse_config
from rlsys.config.schema import Config
from rlsys.config.stages import stage_plans
from rlsys.control.controller import Controller
from rlsys.control.run_context import RunContext
from rlsys.control.weights import WeightBus
from rlsys.data.batches import TrainingData
from rlsys.data.demonstrations import DemonstrationStream
from rlsys.data.prompts import PromptBuilder, PromptStream
from rlsys.data.rows import Reader
from rlsys.display import Display
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.ledger import Ledger
from rlsys.run.metrics import MetricsWriter, read_rows
from rlsys.run.rollout_files import RolloutLog
from rlsys.run.state import read_state
from rlsys.types import RunState

START = RunState(stage=0, step=0, weight_version=0, cursor=0)
KINDS = ("train", "send", "save", "start_stage")


def config(**sections: Any) -> Config:
    values: dict[str, Any] = {
        "run": {"dir": "unused"},
        "stages": ["warm_start", "online"],
        "model": {"path": "unused"},
        "task": {"type": "letter_count"},
        "warm_start": {"max_steps": 2, "rows_per_step": 2},
        "train": {"max_steps": 3, "groups_per_step": 2, "group_size": 2, "updates_per_step": 1},
        "checkpoint": {"interval": 100, "keep_last": 9},
        "evaluation": {"samples": 0, "greedy": True},
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section} if name in values and isinstance(section, dict) else section
    return parse_config(values, "test")


class Run:
    """A controller over fakes in a run directory. A second run in the same directory resumes."""

    def __init__(self, run_dir: Path, settings: Config, failing: tuple[str, ...] = ()) -> None:
        self.run_dir, self.config = run_dir, settings
        self.calls: list[Any] = []
        self.pool = FakePool(2, self.calls, failing)
        self.learner = FakeLearner(self.calls)
        self.model = run_dir / "model"
        self.model.mkdir(parents=True, exist_ok=True)
        (self.model / "tokenizer.json").write_text("{}")
        kept = settings.checkpoint
        best = (kept.best_metric, kept.best_mode) if kept.best_metric else None
        self.checkpoints = CheckpointStore(run_dir / "checkpoints", kept.keep_last, kept.keep_every, best)
        self.checkpoint = self.checkpoints.latest()
        self.state = read_state(self.checkpoint / "state.json") if self.checkpoint else START
        self.task = NumberTask(5)
        rows = DemonstrationStream(
            self.task, lambda question, chain: ([1, 2, 3], [False, True, True]), seed=0, rows_per_step=2, max_tokens=8
        )
        searched = run_dir / "stages" / "search" / "data"
        self.data = TrainingData(
            settings,
            Reader(None, 99, 64),
            {plan.name: rows for plan in stage_plans(settings) if plan.source("demonstrations")},
            searched,
        )
        self.search: Any = None
        self.controller: Controller

    async def start(self) -> None:
        metrics = MetricsWriter(self.run_dir, self.state.weight_version)
        resumed = self.state.weight_version if self.checkpoint else -1
        rollouts = RolloutLog(self.run_dir, resumed, self.config.run.kept_prompts, str)
        builder = PromptBuilder(self.task, lambda text: [1] * len(text), max_model_len=256, max_tokens=8)
        self.context = RunContext(
            config=self.config,
            run_dir=self.run_dir,
            model=self.model,
            tokenizer_files=[self.model / "tokenizer.json"],
            pool=self.pool,
            learner=self.learner,
            bus=WeightBus(self.learner, self.pool, self.config.weight_sync, "fp32", PROBE),
            checkpoints=self.checkpoints,
            metrics=metrics,
            ledger=Ledger(self.run_dir, self.state.weight_version if self.checkpoint else -1),
            display=Display(Console(file=io.StringIO())),
            prompts=PromptStream(builder, 0),
            data=self.data,
            search=self.search,
            policy_digest=lambda policy: "".join(path.read_text() for path in policy.glob("model.safetensors")),
            held_out=[prompt("held_out-0"), prompt("held_out-1")],
            fingerprint={"model.path": "digest"},
            rollouts=rollouts,
        )
        self.controller = Controller(self.context, self.state, self.checkpoint)
        try:
            await asyncio.wait_for(self.controller.run(), 20)
        finally:
            metrics.close()
            rollouts.close()

    def __call__(self) -> Run:
        asyncio.run(self.start())
        return self

    def interrupt_at(self, version: int) -> None:
        """Interrupt the run while the learner makes a version."""
        self.learner.on_train = lambda now: now == version and self.controller.interrupt("SIGTERM")

    def only(self, *kinds: str) -> list[Any]:
        return [call for call in self.calls if call[0] in kinds]

    def rows(self) -> list[tuple[str, int]]:
        return [(row["stage"], row["step"]) for row in read_rows(self.run_dir / "metrics.jsonl")]

    def saved(self) -> dict[str, RunState]:
        folders = sorted((self.run_dir / "checkpoints").iterdir())
        return {folder.name: read_state(folder / "state.json") for folder in folders}
