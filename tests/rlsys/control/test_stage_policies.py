"""The policies that stages export, with an adapter."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from minimal_config import minimal
from safetensors.numpy import load_file, save_file

from rlsys.config.files import parse_config
from rlsys.config.schema import FromScratchConfig, LoraConfig
from rlsys.config.stages import stage_plans
from rlsys.control.stage_policies import StagePolicies
from rlsys.control.stages.training import TrainingStage
from rlsys.models.adapters import adapter_spec
from rlsys.models.folder import is_adapter, weights_digest
from rlsys.models.scratch import build_from_scratch
from rlsys.models.tensors import empty_model

pytestmark = pytest.mark.heavy
SIZE = FromScratchConfig(hidden_size=32, layers=1, heads=1, intermediate_size=32, max_positions=256)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a base model, and a checkpoint of an adapter."""
    folder = tmp_path_factory.mktemp("run")
    build_from_scratch(SIZE, ("<answer>", "</answer>"), 0, folder / "model")
    spec = adapter_spec(empty_model(folder / "model"), LoraConfig(rank=2, alpha=2.0), folder / "model")
    policy = folder / "checkpoints" / "step_000001" / "policy"
    policy.mkdir(parents=True)
    save_file(
        {name: np.ones(shape, np.float32) for name, shape in spec.tensors.items()}, policy / "adapter_model.safetensors"
    )
    spec.save_pretrained(policy)
    (policy / "tokenizer.json").write_text("{}")
    return folder


def stage_policies(run_dir: Path, *stages: str, merge: bool = True) -> StagePolicies:
    lora = {"rank": 2, "alpha": 2.0, "merge": merge}
    values = minimal(model={"path": str(run_dir / "model"), "lora": lora}, stages=stages)
    return StagePolicies(
        config=parse_config(values, "test"), run_dir=run_dir, model=run_dir / "model", policy_digest=weights_digest
    )


def exported(run_dir: Path, stage: Any, merge: bool) -> Path:
    policies = stage_policies(run_dir, "warm_start", "online", merge=merge)
    policies.export_policy(stage, run_dir / "checkpoints" / "step_000001")
    return policies.exported(stage)


@pytest.mark.parametrize(("stage", "merge"), [("warm_start", True), ("warm_start", False), ("online", False)])
def test_a_stage_exports_the_adapter_that_the_next_one_begins_with(run_dir: Path, stage: Any, merge: bool) -> None:
    folder = exported(run_dir, stage, merge)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    ]
    assert is_adapter(folder)


def test_the_last_stage_exports_a_whole_model_if_it_is_asked_to(run_dir: Path) -> None:
    folder = exported(run_dir, "online", True)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    before, after = load_file(run_dir / "model" / "model.safetensors"), load_file(folder / "model.safetensors")
    changed = {
        name: float((after[name] - before[name]).mean())
        for name in before
        if not np.array_equal(before[name], after[name])
    }
    # alpha / rank * B A of ones is 1 * 2 in every element.
    assert len(changed) == 7 and list(changed.values()) == pytest.approx([2.0] * 7, rel=1e-6)
    # The next export replaces it.
    assert is_adapter(exported(run_dir, "online", False))


class Idle(TrainingStage):
    """A stage whose steps are made."""

    async def train(self) -> None:
        raise AssertionError


def test_a_stage_discards_its_policy_and_the_later_ones_but_no_trees(tmp_path: Path) -> None:
    policies = stage_policies(tmp_path, "warm_start", "search", "sft", "online")
    for stage in policies.config.stages:
        policies.exported(stage).mkdir(parents=True)
    policies.discard("online")
    assert sorted(path.name for path in (tmp_path / "stages").iterdir()) == ["search", "sft", "warm_start"]

    async def export_policy(stage: Any) -> None:
        policies.exported(stage).mkdir()

    plan = stage_plans(policies.config)[0]
    run: Any = SimpleNamespace(policies=policies, state=SimpleNamespace(step=plan.steps), export_policy=export_policy)
    asyncio.run(Idle(run, plan).run())
    assert sorted(path.name for path in (tmp_path / "stages").iterdir()) == ["search", "warm_start"]
