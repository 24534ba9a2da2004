"""The simulated run of the driver: real controller and fleet, no real time."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import ModuleType

import pytest


def test_a_run_with_dying_actors_loses_no_prompt_and_waits_for_nothing(
    tmp_path: Path, control_plane: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_plane, "LIFE_S", 300.0)
    started = time.monotonic()
    with asyncio.Runner(loop_factory=control_plane.SimulatedLoop) as runner:
        figures = runner.run(control_plane.simulate(tmp_path / "run", 5, 3, 1))
    assert figures["deaths"] > 0 and figures["lost"] == 0
    assert figures["simulated_s_step"] * 3 > control_plane.START_S + 3 * control_plane.TRAIN_S
    assert time.monotonic() - started < figures["simulated_s_step"]


def test_simulated_seconds_do_not_pass_while_a_thread_works(control_plane: ModuleType) -> None:
    async def work() -> float:
        loop = asyncio.get_running_loop()
        other = asyncio.create_task(asyncio.sleep(1000))
        await asyncio.sleep(5)
        before = loop.time()
        await asyncio.to_thread(time.sleep, 0.05)
        assert loop.time() == before == 5 and not other.done()
        await other
        return loop.time()

    with asyncio.Runner(loop_factory=control_plane.SimulatedLoop) as runner:
        assert runner.run(work()) == 1000


def test_a_section_is_replaced_and_a_page_without_marks_is_refused(tmp_path: Path, results_page: ModuleType) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<b>\nold\n<e>\nz\n")
    results_page.write_section(page, "<b>", "<e>", ["new", "lines"])
    assert page.read_text() == "a\n<b>\nnew\nlines\n<e>\nz\n"
    with pytest.raises(ValueError, match="not found"):
        results_page.write_section(page, "<c>", "<e>", [])
