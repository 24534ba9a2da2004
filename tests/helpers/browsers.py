"""The pages of a run served, and Chromium to open them; for tests and benchmarks/view.py."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from rlsys.commands.view import listen
from rlsys.viewer.app import build
from rlsys.viewer.run_files import RunFiles

PAINTED = "() => new Promise(done => requestAnimationFrame(() => setTimeout(() => done(performance.now() / 1000))))"
"""Script that waits until a page is painted, and returns the seconds since its navigation began."""


class NoBrowserError(Exception):
    """The package playwright or Chromium is missing."""


@contextmanager
def chromium() -> Iterator[Any]:
    """Start Chromium without a window: that of RLSYS_CHROMIUM, of the system, or of playwright.

    Raises:
        NoBrowserError: there is none.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise NoBrowserError("the package playwright is not installed: pip install playwright") from None
    names = ("chromium", "chromium-browser", "google-chrome")
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        program = os.environ.get("RLSYS_CHROMIUM") or next(filter(None, map(shutil.which, names)), own)
        if not Path(program).exists():
            raise NoBrowserError(f"no Chromium at {program}: apt install chromium, or playwright install chromium")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def served(run_dir: Path) -> Iterator[str]:
    """Serve the pages of a run on a free port, and give their address."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(build([RunFiles(run_dir)]), log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
