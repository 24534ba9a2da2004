"""Write checkpoints in forked processes that are killed at a chosen call. Run with kill_at_call.c preloaded.

Usage: checkpoint_child.py LIBRARY. Each line of standard input is a job as JSON. Its outcome is a line of standard
output.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from learners.deepspeed.tensor_files import write_tensors
from rlsys.files import write_json
from rlsys.run.checkpoints import CheckpointStore


def save(store: CheckpointStore, name: str, version: int, text: str) -> Path:
    """Commit a small checkpoint with the files of a real one. `text` makes its contents unique."""
    temporary = store.begin(name)
    tensors = [(f"w {text}", torch.full((3,), float(version)))]
    for folder, stem in (("policy", "model"), ("learner", "exp_avg")):
        write_tensors(tensors, temporary / folder, stem, writes=True)
    shutil.copy(__file__, temporary / "policy" / "tokenizer.json")
    write_json(temporary / "state.json", {"text": text})
    return store.commit(temporary, name, {"weight_version": version})


def act(job: dict[str, Any]) -> None:
    """Run a job: save, sweep or write."""
    path = Path(job["path"])
    if job["action"] == "write":
        write_json(path, job["value"])
        return
    store = CheckpointStore(path, job["keep_last"])
    if job["action"] == "sweep":
        store.sweep()
    else:
        save(store, job["name"], job["version"], job["text"])


def in_fork(job: dict[str, Any], arm: Callable[[int, int, int], None]) -> dict[str, Any]:
    """Run a job in a fork. Return its exit code, or minus the signal, and its calls, each as a line `name path`."""
    with tempfile.TemporaryFile() as notes:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                arm(job["kill_at"], job["half"], notes.fileno())
                act(job)
                code = 0
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        notes.seek(0)
        return {"code": code, "calls": notes.read().decode().splitlines(keepends=True)}


def main(library: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # import now what would be imported late
        save(CheckpointStore(Path(folder), 1), "a", 1, "")
        save(CheckpointStore(Path(folder), 1), "b", 2, "")
    arm = ctypes.CDLL(library).arm
    for line in sys.stdin:
        print(json.dumps(in_fork(json.loads(line), arm)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
