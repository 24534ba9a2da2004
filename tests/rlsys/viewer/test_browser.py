"""The pages in a real browser: curves are drawn, texts run nothing, a chain is marked, a copy opens from disk.

Skipped without the package playwright or without Chromium.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from viewed_run import write_run

from rlsys.commands.view import listen
from rlsys.search.marks import read_marks
from rlsys.viewer.app import build
from rlsys.viewer.export import page as copy_of
from rlsys.viewer.run_files import RunFiles

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = os.environ.get("RLSYS_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no Chromium is installed (Debian package chromium, or RLSYS_CHROMIUM)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium: Any) -> Iterator[Any]:
    """A page that must have no error and load nothing from elsewhere."""
    faults: list[str] = []
    opened = chromium.new_page(viewport={"width": 1280, "height": 900})
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    opened.on(
        "request", lambda request: request.url.startswith(("http://127.0.0.1", "file:")) or faults.append(request.url)
    )
    yield opened
    opened.close()
    assert faults == []


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture
def address(run_dir: Path) -> Iterator[str]:
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(build([RunFiles(run_dir)]), log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()


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
