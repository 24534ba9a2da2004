"""`rlsys score` with two real engines, compared with transformers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from real_runs import REPOSITORY
from transformers import AutoModelForCausalLM
from tree_samples import answer, node, tree

from rlsys.config.files import dump_config, parse_config
from rlsys.data.inputs import prepare_model
from rlsys.models.folder import ModelFolder
from rlsys.search.tree_json import tree_line
from rlsys.types import Int32Array

TEXTS = ("<thinking>a1b1</thinking>", "<answer>2</answer>")


def values(folder: Path, seed: int) -> dict[str, Any]:
    return {
        "run": {"dir": str(folder), "seed": seed},
        "model": {"from_scratch": {"hidden_size": 32, "layers": 1, "heads": 1, "intermediate_size": 16}},
        "task": {"type": "letter_count"},
        "actors": {"kv_cache_gib": 0.1},
        "search": {"prompts": 1, "patterns": ["t"], "tables": {"t": {"children": {
            "start": {"thinking": 1}, "thinking": {"answer": 1}}}}},
    }  # fmt: skip


def means(model: ModelFolder, token_ids: Int32Array, spans: list[tuple[int, int]]) -> list[float]:
    """Return the mean log-probability of the tokens of each span."""
    network = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    ids = torch.from_numpy(token_ids).long()
    with torch.no_grad():
        logprobs = torch.log_softmax(network(ids[None]).logits[0], dim=-1)
    return [
        sum(float(logprobs[place - 1, ids[place]]) for place in range(*span)) / (span[1] - span[0]) for span in spans
    ]


@pytest.mark.long
def test_scores_are_those_of_both_models(tmp_path: Path) -> None:
    models = []
    for name, seed in (("search", 0), ("teacher", 1)):
        config = parse_config(values(tmp_path / name, seed), "test")
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(dump_config(config))
        models.append(prepare_model(config, tmp_path / name))
    policy, teacher = models
    question = policy.tokenizer.encode("<user>count a in ab<assistant>", add_special_tokens=False)
    parts = [policy.tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]

    def array(ids: list[int]) -> Int32Array:
        return torch.tensor(ids, dtype=torch.int32).numpy()

    grown = tree(
        node(0, TEXTS[0], token_ids=array(parts[0])),
        answer(1, TEXTS[1], "ok", token_ids=array(parts[1])),
        question="count a in ab",
        pattern="t",
        tokenizers={"policy": policy.tokenizer_digest},
        prompt_token_ids={"policy": array(question)},
    )
    (tmp_path / "search" / "trees").mkdir()
    (tmp_path / "search" / "trees" / "00000.jsonl").write_text(f"{tree_line(grown)}\n")
    command = [sys.executable, "-m", "rlsys.cli"]
    subprocess.run([*command, "score", tmp_path / "search", teacher.path], check=True, cwd=REPOSITORY)
    row = json.loads((tmp_path / "search" / "scores.jsonl").read_text())
    ends = [len(question), len(question) + len(parts[0]), len(question) + len(parts[0]) + len(parts[1])]
    spans = [(ends[0], ends[1]), (ends[1], ends[2])]
    whole = array([*question, *parts[0], *parts[1]])
    for name, model in (("policy", policy), ("teacher", teacher)):
        assert row["chains"]["2"][name] == pytest.approx(means(model, whole, spans), abs=1e-4)  # rounded to 1e-6
    assert not math.isclose(row["chains"]["2"]["policy"][0], row["chains"]["2"]["teacher"][0], abs_tol=1e-3)
    rules = ["extract.supervised=divergence", "extract.step_values=false"]
    subprocess.run([*command, "extract", tmp_path / "search", *rules], check=True, cwd=REPOSITORY)
    (line,) = (tmp_path / "search" / "data" / "supervised.jsonl").read_text().splitlines()
    assert json.loads(line)["completion"] == "".join(TEXTS)
