"""Trees by a policy and a reviewer with a tokenizer of its own, over Ray; then the reviewer is killed.

Prints as JSON the lines of the trees, what every engine did, and the error of the killed one.

Usage: two_models_child.py POLICY_FOLDER REVIEWER_FOLDER RUN_DIR
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import psutil

from rlsys.config.files import parse_config
from rlsys.config.schema import Config
from rlsys.data.inputs import Inputs
from rlsys.errors import EngineError
from rlsys.launch import session as launch
from rlsys.models.folder import ModelFolder
from rlsys.search.tree_json import tree_line

TREES = 6


def config(policy: str, reviewer: str, run_dir: str) -> Config:
    nodes = {
        "thinking": {"tag": "thinking"},
        "double_check": {"tag": "double-check", "writer": "reviewer"},
        "answer": {"tag": "answer", "terminal": True},
    }
    children = {
        "start": {"thinking": 2, "double_check": 2},
        "thinking": {"double_check": 1, "answer": 1},
        "double_check": {"answer": 1},
    }
    values = {
        "run": {"dir": run_dir},
        "model": {"path": policy},
        "task": {"type": "letter_count"},
        "actors": {"count": 1, "max_model_len": 192, "kv_cache_gib": 0.1},
        "sampling": {"max_tokens": 100},
        "search": {
            "reviewer": {"path": reviewer, "kv_cache_gib": 0.1, "max_model_len": 256},
            "nodes": nodes,
            "tables": {"t": {"children": children}},
            "patterns": ["t"],
            "max_node_tokens": 12,
        },
    }
    return parse_config(values, "test")


def kill_reviewer() -> None:
    for process in psutil.Process().children(recursive=True):
        if "ModelActor" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)


def main(policy: str, reviewer: str, run_dir: str) -> None:
    found: dict[str, Any] = {}

    def begin(inputs: Inputs, models: Mapping[Any, ModelFolder]) -> launch.Grow:
        found["models"] = {writer: str(model.path) for writer, model in models.items()}
        prompts = [inputs.builder.build("train", index) for index in range(TREES)]

        async def grow(pool: Any, _stop: Any) -> None:
            await pool.reset_engine_stats()
            trees = await asyncio.gather(*(pool.grow(0, prompt) for prompt in prompts))
            found["trees"] = [tree_line(tree) for tree in trees]
            found["usage"] = [asdict(usage) for usage in await pool.engine_stats()]
            kill_reviewer()
            await pool.grow(0, prompts[0])

        return grow

    try:
        launch.grow_trees(config(policy, reviewer, run_dir), begin)
    except EngineError as error:
        found["error"] = error.message
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
