"""The comparison of searches with samples: its arms, its stored cells and its tables."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fakes import prompt

from rlsys.config.schema import Config
from rlsys.config.search import CorrectRule
from rlsys.types import StepVerdict


@pytest.fixture
def search_use(importable: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # a benchmark replaces the first entry
    return importlib.import_module("search_use")


@pytest.fixture
def search_page(search_use: ModuleType) -> ModuleType:
    page: ModuleType = search_use.search_page
    return page


def test_the_arms_differ_in_nothing_but_what_they_are_named_after(search_use: ModuleType) -> None:
    setup = search_use.TASKS["letter_count"]
    configs = [search_use.config_of(setup, Path("policy"), arm) for arm in search_use.ARMS.values()]
    names = [
        f"{'surprise' if search.selection.type == 'surprise' else search.expansion}, "
        f"{search.selection.unit if search.selection.type == 'surprise' else search.selection.type.upper()}"
        f"{', backtracking once' if search.backtracking else ''}{', step check' if search.value else ''}"
        f"{', 8 at once' if search.parallel_simulations == 8 else ''}"
        for search in (config.search for config in configs)
    ]
    assert names == list(search_use.ARMS)
    # Node expansion asks for every child of a row, so it has a table of its own with fewer of them.
    assert all(
        config.search.patterns == (("narrow",) if config.search.expansion == "node" else ("chain",))
        for config in configs
    )
    same = {
        "expansion": "chain",
        "backtracking": True,
        "max_backtracks": 1,
        "value": None,
        "parallel_simulations": 1,
        "patterns": ("chain",),
        "selection": configs[0].search.selection,
    }
    searches = [config.search.model_copy(update=same) for config in configs]
    assert all(search == searches[0] for search in searches)
    stop = searches[0].stop
    assert (stop.correct, stop.tokens, stop.answers) == ((CorrectRule(count=1),), 512, None)
    assert search_use.sampling_of(configs[0]).temperature == 1.0


def test_every_task_has_its_configs(search_use: ModuleType) -> None:
    for setup in search_use.TASKS.values():
        for arm in search_use.ARMS.values():
            assert search_use.config_of(setup, Path("policy"), arm).search.stop.tokens == max(setup.budgets)
        assert (search_use.ROOT / "configs" / f"{setup.warm_start}.yaml").exists()


def test_seeds_draw_other_prompts_under_other_names(search_use: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def inputs(config: Config, _policy: Path, *, training: bool) -> SimpleNamespace:
        assert not training
        count = config.evaluation.prompts
        return SimpleNamespace(held_out=[prompt(f"held_out-{i}", 3 + config.run.seed) for i in range(count)])

    monkeypatch.setattr(search_use, "Inputs", inputs)
    config = search_use.config_of(search_use.TASKS["letter_count"], Path("policy"), [])
    drawn = [p for seed in (0, 1) for p in search_use.prompts_of(config, Path("policy"), seed, 2)]
    names = ["seed-0/held_out-0", "seed-0/held_out-1", "seed-1/held_out-0", "seed-1/held_out-1"]
    assert [p.prompt_id for p in drawn] == names
    assert [len(p.token_ids) for p in drawn] == [3, 3, 4, 4]


def test_a_cell_of_other_settings_is_not_read(search_use: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    setup = search_use.TASKS["letter_count"]

    def cells(*settings: str, count: int = 2) -> Any:
        config = search_use.config_of(setup, tmp_path / "policy", settings)
        return search_use.Cells("an arm", tmp_path, config, tmp_path / "policy", count)

    first, folder = cells(), tmp_path / "an_arm"
    assert first.read(0) is None
    folder.mkdir()
    (folder / "seed-0.json").write_text(json.dumps({"asked": first.asked, "rows": [1]}))
    assert (first.read(0), cells().read(0), first.read(1)) == ([1], [1], None)
    assert (cells(count=3).read(0), cells("search.max_depth=9").read(0)) == (None, None)


def test_the_steps_of_a_chain_are_right_wrong_or_unknown(search_use: ModuleType) -> None:
    verdicts = {"right": StepVerdict(), "wrong": StepVerdict(wrong_node=1), "unknown": None}
    task = SimpleNamespace(check_steps=lambda question, chain: verdicts[chain])
    assert [search_use.all_right(task, "q", chain) for chain in verdicts] == [True, False, None]


def figures(search_page: ModuleType) -> Any:
    """Return figures of 2 seeds of 2 prompts.

    Samples solve one prompt of seed 0 and both of seed 1 within 32 tokens. The search solves all, from 64 tokens on,
    with every step right in 3 of 4 chains.
    """

    def row(solved_at: int | None, sound: bool | None = None) -> dict[str, Any]:
        return {"solved_at": solved_at, "total": solved_at or 40, "sound": sound}

    samples = [[row(30), row(None)], [row(30), row(30)]]
    search = [[row(64, True), row(60, True)], [row(64, True), row(50, False)]]
    rows = {"a search": search, search_page.SAMPLES: samples}
    return search_page.Figures("letter_count", (32, 64), rows, [["a", "b"], ["c", "d"]])


def test_tables_by_hand(search_page: ModuleType) -> None:
    rows = [[cell.strip() for cell in line.split("|")] for line in figures(search_page).lines()]
    shares, differences, sound = (row for row in rows if row[1:2] == ["64"])
    assert sound[2].startswith("+0.750 (")  # 3 of 4 chains, and nobody can check the samples
    assert shares[2].startswith("1.000 (") and shares[2].endswith("; 1.000 to 1.000)")
    assert shares[3].startswith("0.750 (") and shares[3].endswith("; 0.500 to 1.000)")
    assert differences[2].startswith("+0.250 (") and differences[2].endswith(", 1.33")
    search, samples = rows[-2:]
    assert search[2].startswith("0.750 (") and search[2].endswith(" of 4") and search[3] == "0.000"
    assert samples[2:4] == ["not known of 0", "0.250"]


def test_the_page_keeps_what_stands_outside_its_marks(
    search_page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- letter_count: written by benchmarks/search_use.py -->\nold\n<!-- end -->\nAfter.\n")
    monkeypatch.setattr(search_page, "PAGE", page)
    monkeypatch.setattr(search_page, "FOLDER", tmp_path / "search_use")
    search_page.write({"letter_count": figures(search_page)})
    text = page.read_text()
    assert text.startswith("Before.\n") and text.endswith("<!-- end -->\nAfter.\n") and "old" not in text
    assert (tmp_path / "search_use" / "letter_count.png").stat().st_size > 0
    stored = json.loads((tmp_path / "search_use" / "letter_count.json").read_text())
    assert stored["a search"][1] == [[64, 64, True], [50, 50, False]]
