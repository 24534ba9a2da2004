"""docs/keys.md: up to date, and one row for every key."""

from __future__ import annotations

import re
from pathlib import Path

from rlsys.config.keys import all_keys
from rlsys.config.keys_page import page

PAGE = Path(__file__).parents[3] / "docs" / "keys.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run `make docs`"


def test_every_key_has_a_row_of_four_cells() -> None:
    rows = [line for line in page().splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in rows] == [key.name for key in all_keys()]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}
