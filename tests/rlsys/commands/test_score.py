"""`rlsys score` refuses what it cannot score, before an engine starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tree_samples import answer, ids, node, tree

from rlsys.commands import score as score_command
from rlsys.commands.extract import find_source
from rlsys.config.files import dump_config, parse_config
from rlsys.data.inputs import prepare_model
from rlsys.errors import ConfigError
from rlsys.models.folder import ModelFolder
from rlsys.search.tree_json import tree_line


def search_dir(folder: Path, task: str, outcome: Any = "ok") -> ModelFolder:
    """Write a run directory with a tree of one chain; return its model."""
    folder.mkdir()
    values: dict[str, Any] = {
        "run": {"dir": str(folder)},
        "model": {"from_scratch": {"hidden_size": 32, "layers": 1, "heads": 1, "intermediate_size": 16}},
        "task": {"type": task},
    }
    config = parse_config(values, "test")
    (folder / "config.yaml").write_text(dump_config(config))
    model = prepare_model(config, folder)
    grown = tree(
        node(0, "a", token_ids=ids("", 68)),
        answer(1, "b", outcome, token_ids=ids("", 69)),
        tokenizers={"policy": model.tokenizer_digest},
        prompt_token_ids={"policy": ids("", 68)},
    )
    (folder / "trees").mkdir()
    (folder / "trees" / "00000.jsonl").write_text(f"{tree_line(grown)}\n")
    return model


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    search_dir(tmp_path / "search", "letter_count")
    other = search_dir(tmp_path / "other", "blocksworld")
    source = find_source(tmp_path / "search", [])
    with pytest.raises(ConfigError, match=r"the teacher .*: expected the tokenizer of the policy"):
        score_command.run(source, str(other.path), tmp_path / "scores.jsonl")
    with pytest.raises(ConfigError, match="the teacher"):
        score_command.run(source, str(tmp_path / "missing"), tmp_path / "scores.jsonl")
    assert not (tmp_path / "scores.jsonl").exists()


def test_trees_without_a_right_chain_are_refused(tmp_path: Path) -> None:
    model = search_dir(tmp_path / "search", "letter_count", "wrong")
    with pytest.raises(ConfigError, match=r"trees: expected trees with a correct chain, found none"):
        score_command.run(find_source(tmp_path / "search", []), str(model.path), tmp_path / "scores.jsonl")
