"""A search on the warm-started tiny model, and what is found in its run directory at any moment."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from real_runs import SHARD, TINY, TREES, Command


def search_config(policy: Path, prompts: int) -> dict[str, Any]:
    """With an engine so small that trees come one after the other, and a kill finds some of them."""
    return {
        "run": {"seed": 3},
        "model": {"path": str(policy)},
        "task": TINY["task"],
        "actors": {"count": 2, "max_model_len": 128, "max_num_seqs": 2, "kv_cache_gib": 0.1},
        "sampling": {"max_tokens": 60},
        "search": {**TREES, "prompts": prompts, "shard_size": SHARD},
    }


def tree_files(run_dir: Path) -> dict[str, bytes]:
    """Everything under trees/, by name."""
    folder = run_dir / "trees"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def finished_trees(run_dir: Path) -> dict[str, str]:
    """The line of every finished tree by the id of its prompt, of shards and of those that wait for theirs."""
    files = [*(run_dir / "trees").glob("*.jsonl"), *(run_dir / "trees" / ".open").glob("*.json")]
    lines = [line for path in files for line in path.read_text().splitlines()]
    return {json.loads(line)["prompt_id"]: line for line in lines}


def whole_shards(run_dir: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every complete shard: they change with every writing."""
    found = {}
    for path in (run_dir / "trees").glob("*.jsonl"):
        found[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def count_finished(run_dir: Path) -> int:
    """Return the number of trees of a search that is running. A tree that is just moved may count twice."""
    shards = len(list((run_dir / "trees").glob("*.jsonl")))
    return SHARD * shards + len(list((run_dir / "trees" / ".open").glob("*.json")))


def wait_until(command: Command, happened: Callable[[], bool]) -> None:
    """Wait for a moment of a search."""
    while not happened():
        assert command.running, f"the search ended early\n{command.stdout}\n{command.stderr}"
        time.sleep(0.002)


def announced(command: Command) -> tuple[int, int]:
    """Return the number of trees at the start of a finished command and at its end, from its output."""
    found = re.search(r"^trees: (\d+) of (\d+) are finished$", command.stdout, re.MULTILINE)
    assert found is not None, command.stdout
    return int(found[1]), int(found[2])


def summary(run_dir: Path) -> Mapping[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())
