"""The benchmarks refuse what would make their figures wrong."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from fakes import prompt

from rlsys.config import Config
from rlsys.search_config import CorrectRule
from rlsys.search_evaluation import Attempts


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # a benchmark replaces the first entry
    spec.loader.exec_module(module)
    # In the benchmark alone: matplotlib, too, runs a program where it has not listed the fonts before.
    refusing = SimpleNamespace(run=lambda *arguments, **options: pytest.fail("a run was started"))
    monkeypatch.setattr(module, "subprocess", refusing)
    return module


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("quickstart", monkeypatch)


@pytest.fixture
def search_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    module = load("search_use", monkeypatch)
    monkeypatch.setattr(module, "PICTURE", tmp_path / "docs" / "picture.png")
    monkeypatch.setattr(module, "OWN_RUN", tmp_path / "own")
    monkeypatch.setattr(module, "POLICY", tmp_path / "quickstart")
    return module


def test_a_run_that_was_cut_short_is_not_timed_from_its_resume(quickstart: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "online"}\n')
    with pytest.raises(SystemExit, match="cut short"):
        quickstart.run(0, tmp_path)
    (tmp_path / "wall-seconds").write_text("12.0\n")
    assert quickstart.run(0, tmp_path) == [{"stage": "online"}]


def test_the_folder_of_the_picture_is_made(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "PICTURE", tmp_path / "docs" / "picture.png")
    row = {"stage": "online", "step": 1, "rollout/reward": 0.5, "held_out/sampled_accuracy": 0.5}
    quickstart.plot({0: [row]})
    assert quickstart.PICTURE.stat().st_size > 0


def test_the_arms_of_the_search_differ_in_nothing_but_what_they_are_named_after(search_use: ModuleType) -> None:
    configs = [search_use.config_of(Path("policy"), *arm) for arm in search_use.ARMS.values()]
    assert [(config.search.expansion, config.search.backtracking) for config in configs] == [
        *(("chain", True), ("chain", False), ("node", True), ("node", False))
    ]
    # Node expansion asks for every child of a row, so it has a table of its own with fewer of them.
    assert [config.search.patterns for config in configs] == [("chain",)] * 2 + [("narrow",)] * 2
    same = {"expansion": "chain", "backtracking": True, "patterns": ("chain",)}
    searches = [config.search.model_copy(update=same) for config in configs]
    assert all(search == searches[0] for search in searches)
    stop = searches[0].stop
    assert (stop.correct, stop.tokens, stop.answers) == ((CorrectRule(count=1),), 512, None)
    assert search_use.sampling_of(configs[0]).temperature == 1.0


def test_seeds_draw_other_prompts_under_other_names(search_use: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def inputs(config: Config, _policy: Path, *, training: bool) -> SimpleNamespace:
        assert not training
        count = config.evaluation.prompts
        return SimpleNamespace(held_out=[prompt(f"held_out-{i}", 3 + config.run.seed) for i in range(count)])

    monkeypatch.setattr(search_use, "Inputs", inputs)
    config = search_use.config_of(Path("policy"), "chain", True)
    found = [p for seed in (0, 1) for p in search_use.prompts_of(config, Path("policy"), seed, 2)]
    names = ["seed-0/held_out-0", "seed-0/held_out-1", "seed-1/held_out-0", "seed-1/held_out-1"]
    assert [p.prompt_id for p in found] == names
    assert [len(p.token_ids) for p in found] == [3, 3, 4, 4]


def test_a_policy_that_is_there_is_not_trained_again(search_use: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "own" / "stages" / "warm_start").mkdir(parents=True)
    assert search_use.find_policy(None) == tmp_path / "own" / "stages" / "warm_start"
    (tmp_path / "quickstart").mkdir()
    assert search_use.find_policy(None) == tmp_path / "quickstart"
    assert search_use.find_policy(Path("given")) == Path("given").absolute()


def test_tables_and_picture_of_the_search(search_use: ModuleType) -> None:
    # 2 seeds of 2 prompts. Samples solve one prompt of seed 0, and both of seed 1; searches all, from 64 tokens on.
    samples = np.zeros((2, 2, len(search_use.BUDGETS)), dtype=bool)
    samples[0, 0] = samples[1] = True
    search = np.ones_like(samples)
    search[:, :, :2] = False
    solved = dict.fromkeys(search_use.ARMS, search) | {search_use.SAMPLES: samples}
    rows = search_use.tables(solved, dict.fromkeys(search_use.ARMS, 0.25)).splitlines()
    shares, differences = ([cell.strip() for cell in row.split("|")] for row in rows if row.startswith("| 64 "))
    assert shares[2].startswith("1.000 (") and shares[2].endswith("; 1.000 to 1.000)")
    assert shares[6].startswith("0.750 (") and shares[6].endswith("; 0.500 to 1.000)")
    assert differences[2].startswith("+0.250 (+0.000 to ")
    assert rows[-1].count("0.250") == 4
    search_use.plot(solved)
    assert search_use.PICTURE.stat().st_size > 0
    config = search_use.config_of(Path("policy"), "chain", True)
    assert "--prompts 2 --seeds 2 --write" in search_use.page("", config, 2, 2)


def test_a_search_that_ended_is_told_from_one_that_solved_or_spent_all(search_use: ModuleType) -> None:
    def attempts(right: bool, total: int) -> Attempts:
        return Attempts(right=np.array([right]), tokens=np.array([5]), total=total)

    found = [attempts(True, 5), attempts(False, 40), attempts(False, 511), attempts(False, 512)]
    assert search_use.ended_unsolved(found) == 0.5
    assert [search_use.is_enough(one) for one in found] == [True, False, False, True]
