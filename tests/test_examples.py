"""Code and configs of the pages about functions of the user's own, run as a reader would."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import yaml
from minimal_config import minimal
from pages import blocks, write_files
from problems import problem_of

from actors.verifiers.pool import RewardPool
from learners.plugins import check_plugins, custom_advantages
from rlsys.config.files import parse_config
from rlsys.config.schema import Config
from rlsys.config.search_values import FunctionValueConfig
from rlsys.types import Verdict


def read(page: str, folder: Path) -> Config:
    """Write the files that a page shows, and return the config of the YAML that names the first one."""
    write_files(page, folder)
    name = next(block.name for block in blocks(page, "python") if block.name)
    [settings] = [block.text for block in blocks(page, "yaml") if name in block.text]
    return parse_config(minimal(**yaml.safe_load(settings)), page)


def judged(config: Config, folder: Path, completion: str) -> tuple[Verdict, list[Verdict]]:
    value = config.search.value if isinstance(config.search.value, FunctionValueConfig) else None

    async def run() -> tuple[Verdict, list[Verdict]]:
        pool = RewardPool(config.task, 0, config.rewards, folder=str(folder), value=value)
        try:
            [verdict] = await pool.verify([(problem_of("3"), completion)])
            return verdict, await pool.values(problem_of("3"), [completion]) if value else []
        finally:
            await pool.close()

    return asyncio.run(run())


def test_rewards(tmp_path: Path) -> None:
    verdict, _ = judged(read("docs/rewards.md", tmp_path), tmp_path, "<answer>3</answer>")
    assert verdict.parts == {"task": 1.0, "brevity": pytest.approx(-0.018), "format": 1.0}
    assert verdict.reward == pytest.approx(1 - 0.1 * 0.018 + 0.2)


def test_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read("docs/extending.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    check_plugins(config.objective)
    estimator = config.objective.policy.estimator
    assert custom_advantages(np.array([1.0, 3.0]), estimator).tolist() == [-2.0, 0.0]
    _, [value] = judged(config, tmp_path, "x" * 50)
    assert value.reward == pytest.approx(0.75)


def test_configs_of_sizes() -> None:
    configs = [parse_config(yaml.safe_load(block.text), str(block)) for block in blocks("docs/sizes.md", "yaml")]
    assert [config.model.path for config in configs] == [
        f"Qwen/Qwen2.5-{size}B-Instruct" for size in ("0.5", "7", "32")
    ]
