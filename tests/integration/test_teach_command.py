"""`rlsys teach` with a real engine: its scores are those of transformers, and a training run reads its file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from real_runs import REPOSITORY
from transformers import AutoModelForCausalLM

from rlsys.config.files import dump_config, parse_config
from rlsys.data.inputs import prepare_model
from rlsys.data.rows import Reader
from rlsys.data.teacher_columns import ExpectedScores
from rlsys.models.folder import ModelFolder

TOP_K = 3
SIZE = {"hidden_size": 32, "layers": 1, "heads": 1, "intermediate_size": 16}


def made(folder: Path, seed: int) -> ModelFolder:
    """Return a model from scratch."""
    folder.mkdir()
    values: dict[str, Any] = {"run": {"dir": str(folder), "seed": seed}, "model": {"from_scratch": SIZE}}
    return prepare_model(parse_config({**values, "task": {"type": "letter_count"}}, "test"), folder)


@pytest.mark.long
def test_the_scores_are_those_of_the_teacher(tmp_path: Path) -> None:
    policy, teacher = made(tmp_path / "policy", 0), made(tmp_path / "teacher", 1)
    rows = [
        {"prompt": f"<user>count a in {word}<assistant>", "completion": f"<answer>{word.count('a')}</answer>"}
        for word in ("abca", "bb")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = parse_config(
        {
            "run": {"dir": str(tmp_path / "run")},
            "stages": ["sft"],
            "model": {"path": str(policy.path)},
            "task": {"type": "letter_count"},
            "actors": {"kv_cache_gib": 0.1},
            "sft": {"path": str(tmp_path / "rows.jsonl")},
            "teacher": {"model": {"path": str(teacher.path), "kv_cache_gib": 0.1}},
            "objective": {"distill": {"weight": 1, "divergence": "top_k", "top_k": TOP_K, "on_policy_share": 0}},
        },
        "test",
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    output = tmp_path / "scored.parquet"
    command = [sys.executable, "-m", "rlsys.cli", "teach", tmp_path / "config.yaml", output]
    said = subprocess.run(command, check=True, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True).stdout
    assert "2 rows scored" in said
    assert subprocess.run(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL).returncode == 2  # the file exists
    network = AutoModelForCausalLM.from_pretrained(teacher.path, dtype=torch.float32)
    for row in pq.read_table(output).to_pylist():
        ids = torch.tensor(row["token_ids"])
        with torch.no_grad():
            logprobs = torch.log_softmax(network(ids[None]).logits[0, :-1], dim=-1)
        places = [place for place, trained in enumerate(row["loss_mask"]) if trained]
        found = torch.tensor(row["teacher_logprobs"]).reshape(len(places), TOP_K)
        best = logprobs[[place - 1 for place in places]].topk(TOP_K)
        assert torch.allclose(found, best.values, atol=1e-4) and len(places) > 3
        assert row["teacher_ids"] == best.indices.flatten().tolist()
    expected = ExpectedScores(tokens=TOP_K, tokenizer=policy.tokenizer_digest, optional=False)
    reader = Reader(policy.tokenizer, len(policy.tokenizer), 256, frozenset(policy.end_token_ids), expected)
    read = reader.supervised(str(output), "sft.path")
    assert read.teacher is not None and len(read) == 2
    scores = read.row(0).teacher
    assert scores is not None and scores.ids.shape == (len(read.row(0).token_ids), TOP_K)
