"""Data files of the stages sft and preference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PAIRS = 7


def files(folder: Path) -> dict[str, Any]:
    """Write data files and return the config sections that use them; rejected side n ends with the token 10 + n."""
    rows = [{"token_ids": [1, 10 + n], "loss_mask": [False, True]} for n in range(5)]
    sides = [{"chosen_ids": [1, 2], "rejected_ids": [1, 10 + n], "prompt_length": 1, "common_prefix": 1}
             for n in range(PAIRS)]  # fmt: skip
    for name, lines in (("rows", rows), ("pairs", sides)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "sft": {"path": str(folder / "rows.jsonl"), "max_steps": 2, "rows_per_step": 3},
        "preference": {"path": str(folder / "pairs.jsonl"), "max_steps": 4, "pairs_per_step": 2},
        "objective": {"preference": {"weight": 1.0}},
    }
