"""Two models with two tokenizers grow trees together: a policy on its actor, a reviewer on an engine beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bpe_model import build_bpe_model
from two_models_child import TREES

from rlsys.config.schema import FromScratchConfig
from rlsys.models.folder import ModelFolder
from rlsys.models.scratch import build_from_scratch
from rlsys.search.tree_json import parse_line
from rlsys.trees import Tree

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(300)]
HERE = Path(__file__).parent
TAGS = ("<thinking>", "</thinking>", "<double-check>", "</double-check>", "<answer>", "</answer>")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    size = FromScratchConfig(hidden_size=64, layers=2, heads=2, intermediate_size=64)
    build_from_scratch(size, TAGS, 0, folder / "policy")
    build_bpe_model(folder / "reviewer", ["<double-check>ab 1</double-check><answer>1</answer>"] * 20, vocab_size=300)
    return {name: folder / name for name in ("policy", "reviewer")}


@pytest.fixture(scope="module")
def found(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run_dir = tmp_path_factory.mktemp("two") / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / "two_models_child.py"), *map(str, models.values()), str(run_dir)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def trees(found: dict[str, Any]) -> list[Tree]:
    trees = [parse_line(line) for line in found["trees"]]
    assert len(trees) == TREES and all(isinstance(tree, Tree) for tree in trees)
    return [tree for tree in trees if isinstance(tree, Tree)]


def test_each_type_of_node_is_written_by_its_model(trees: list[Tree]) -> None:
    writers = {(node.type, node.writer) for tree in trees for node in tree.nodes if node.generated}
    assert {("thinking", "policy"), ("double_check", "reviewer")} <= writers
    assert all(writer == ("reviewer" if kind == "double_check" else "policy") for kind, writer in writers)


def test_each_model_reads_and_writes_tokens_of_its_own(trees: list[Tree], models: dict[str, Path]) -> None:
    tokenizers = {name: ModelFolder(folder).tokenizer for name, folder in models.items()}
    digests = {name: ModelFolder(folder).tokenizer_digest for name, folder in models.items()}
    for tree in trees:
        assert tree.tokenizers == digests
        assert tree.models == {name: ModelFolder(folder).digest for name, folder in models.items()}
        for writer, ids in tree.prompt_token_ids.items():
            assert tree.question in tokenizers[writer].decode(ids)
        for node in tree.nodes[1:]:
            forced = tokenizers[node.writer].decode(node.token_ids[: node.forced], skip_special_tokens=False)
            assert forced.startswith(f"<{node.type.replace('_', '-')}>")
    # <double-check> is one token of the policy's and several of the reviewer's.
    lengths = {node.writer: node.forced for tree in trees for node in tree.nodes[1:]}
    assert lengths["policy"] == 1 < lengths["reviewer"]


def test_every_engine_tells_what_it_did(found: dict[str, Any], trees: list[Tree]) -> None:
    usage = {(row["model"], row["engine"]): row for row in found["usage"]}
    assert set(usage) == {("policy", 0), ("reviewer", 0)}
    assert sum(row["generated_tokens"] for row in usage.values()) == sum(tree.tokens for tree in trees)
    for row in usage.values():
        assert row["generated_tokens"] > 0 and row["prompt_tokens"] > 0 and row["in_flight_mean"] >= 1
        assert 0 < row["busy_s"] <= row["wall_s"] + 0.1  # a step counts when it ends


def test_a_killed_reviewer_is_named_with_the_place_of_its_log(found: dict[str, Any]) -> None:
    assert found["error"].startswith("reviewer engine 0 died: ")
    assert found["error"].endswith("/run/logs)")
