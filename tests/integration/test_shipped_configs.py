"""Shipped configs: `rlsys check` accepts them, and the one for GPUs makes two steps on a CPU."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from joint_runs import check_figures, check_gradients, check_terms, rows_of
from real_runs import Command
from shipped_configs import CONFIGS, GSM8K, gsm8k_overrides

from rlsys import cli
from rlsys.config.files import load_config, parse_yaml
from rlsys.run.metrics import read_rows

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


def generated() -> list[str]:
    """The configs that need no model or data from elsewhere."""
    names = []
    for path in sorted(CONFIGS.glob("*.yaml")):
        values = parse_yaml(path.read_text(), path.name)
        if "from_scratch" in values["model"] and not any(name.endswith("path") for name in values["task"]):
            names.append(path.name)
    return names


def test_most_shipped_configs_need_nothing_from_elsewhere() -> None:
    assert {"quickstart.yaml", "joint_online.yaml", "marco_o1_v2_offline.yaml"} < set(generated())


@pytest.mark.parametrize("name", generated())
def test_check_accepts_a_shipped_config(
    name: str,
    quiet_transformers: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    config = load_config(CONFIGS / name)
    monkeypatch.setattr(sys, "argv", ["rlsys", "check", str(CONFIGS / name), f"run.dir={tmp_path / 'run'}"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    output, errors = capsys.readouterr()
    assert ended.value.code == 0, errors
    assert re.search(
        rf"^processes +{config.actors.count} actors?, {config.learner.ranks} learner ranks?$", output, re.MULTILINE
    )
    assert output.splitlines()[-1] == "ok"
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.skipif("RLSYS_DATA" not in os.environ, reason="RLSYS_DATA names no folder with GSM8K")
def test_two_steps_of_the_config_for_gpus(start: Callable[..., Command], tmp_path: Path) -> None:
    """The file itself, with another place, model, data and size. The method is the file's."""
    overrides = gsm8k_overrides(tmp_path)
    shipped, used = load_config(GSM8K), load_config(GSM8K, overrides)
    assert used.objective == shipped.objective and used.extract == shipped.extract
    assert used.search.nodes == shipped.search.nodes and used.search.tables == shipped.search.tables
    assert used.search.fraction == shipped.search.fraction and used.search.expansion == shipped.search.expansion
    assert used.task.prompt_template == shipped.task.prompt_template
    for name in ("group_size", "updates_per_step", "dynamic_sampling_rounds", "max_staleness", "optimizer"):
        assert getattr(used.train, name) == getattr(shipped.train, name), name

    start("train", str(GSM8K), *overrides).finish()
    check_figures(read_rows(tmp_path / "run" / "metrics.jsonl"))
    rows = rows_of(tmp_path / "run", "online")
    assert [row["step"] for row in rows] == [1, 2]
    objective = shipped.objective
    weights = {name: getattr(objective, name).weight for name in ("policy", "kl", "preference", "sft")}
    for row in rows:
        check_terms(row, weights)
        assert row["search/trees"] > 0 and row["rollout/tokens"] > 0 and row["search/scored"] > 0
        assert row["objective/policy_denominator"] > 0 and row["objective/kl_denominator"] > 0
        # Pairs and their chosen chains are those of the trees. A denominator is a mean over the updates.
        assert row["objective/preference_denominator"] * row["learner/updates"] == row["search/pairs"]
        assert (row["objective/sft_denominator"] > 0) == (row["search/pairs"] > 0)
        assert row["rollout/staleness_max"] <= shipped.train.max_staleness
    check_gradients(rows[0], tuple(weights))
    assert rows[0]["rollout/filtered"] > 0  # what the tiny model samples is mostly wrong
