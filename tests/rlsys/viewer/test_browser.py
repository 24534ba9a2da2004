"""The pages in a real browser: curves are drawn, texts run nothing, a chain is marked, a copy opens from disk.

Skipped without the package playwright or without Chromium.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import served
from viewed_run import write_run

from rlsys.search.marks import read_marks
from rlsys.viewer.export import page as copy_of
from rlsys.viewer.run_files import RunFiles

pytestmark = pytest.mark.heavy


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture
def address(run_dir: Path) -> Iterator[str]:
    with served(run_dir) as address:
        yield address


def test_curves_are_drawn_and_texts_run_nothing(tab: Any, address: str) -> None:
    tab.goto(address)
    tab.wait_for_selector(".chart canvas")
    assert tab.locator(".chart canvas").count() == tab.locator("details[open] .chart").count() > 0
    for path in ("/timeline", "/rollouts", "/trees", "/tree/0"):
        tab.goto(address + path)
        assert tab.evaluate("window.hacked") is None
        wide = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        assert tab.evaluate(wide), f"{path} is wider than 1280 px"


def test_the_colours_of_tokens_can_be_chosen_without_a_script(tab: Any, address: str) -> None:
    def background(of: str) -> str:
        return str(tab.locator(of).first.evaluate("each => getComputedStyle(each).backgroundColor"))

    tab.goto(f"{address}/rollouts")
    neutral, positive = "rgba(0, 0, 0, 0)", background(".rollout .ap2")
    assert positive == background(".legend .ap2") != neutral
    assert background(".rollout .an2") not in (positive, neutral)
    assert tab.locator(".legend:visible").count() == 1
    tab.get_by_label("actor-learner gap").check()
    assert background(".rollout .gp3") == background(".legend .gp3") != neutral
    assert background(".rollout .g0") == neutral, "its advantage is not 0"
    tab.get_by_label("log-probability").check()
    assert background(".rollout .s0") == neutral
    tab.get_by_role("button", name="earlier").click()
    tab.wait_for_url("**colour=chance**")
    assert tab.get_by_label("log-probability").is_checked() and tab.locator("input[name=version]").input_value() == "2"
    tab.locator("input[name=version]").press("Enter")
    tab.wait_for_load_state()
    assert tab.locator("input[name=version]").input_value() == "2", "Enter stands for the button Show"


def test_curves_grow_while_the_run_goes_on(tab: Any, address: str, run_dir: Path) -> None:
    (run_dir / "lock").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    tab.goto(address)
    tab.wait_for_selector(".chart canvas")
    with (run_dir / "metrics.jsonl").open("a") as file:  # its last line is cut after {"stage": "onl
        file.write('ine", "step": 4, "weights/version": 4, "rollout/reward": 0.8125}\n')
    tab.locator(".last", has_text="0.8125").first.wait_for()
    assert "step 4, weight version 4" in tab.inner_text("main")


def test_a_chain_is_marked_by_its_button(tab: Any, address: str, run_dir: Path) -> None:
    tab.goto(f"{address}/tree/0")
    tab.locator("button:visible", has_text="Mark this chain as bad").first.click()
    tab.wait_for_selector("text=Take the mark away")
    assert sum(map(len, read_marks(run_dir / "marks.json").values())) == 1


def test_a_copy_opens_from_disk(tab: Any, run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.html").write_text(copy_of([RunFiles(run_dir)]))
    tab.goto((tmp_path / "copy.html").as_uri())
    tab.wait_for_selector(".chart canvas")
    assert tab.evaluate("window.hacked") is None
