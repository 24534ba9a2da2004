"""Chromium for the tests of the pages. They are skipped without it, or without the package playwright."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import browsers
import pytest


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    try:
        with browsers.chromium() as browser:
            yield browser
    except browsers.NoBrowserError as error:
        pytest.skip(str(error))


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
