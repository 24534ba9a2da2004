"""Actors and learner agree for every architecture: two online steps on tiny random models, one run each.

With RLSYS_WRITE_FIGURES set, each run replaces its row of the table in docs/models.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from real_runs import Command, last_checkpoint, write_config
from reliability import VARIABLE
from tiny_architectures import Architecture, build_architecture

from learners.deepspeed.model import load_model
from rlsys.run.metrics import read_rows

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(900)]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
ROUNDING = 2e-5  # fp32 log-probabilities of two programs that sum in another order; 2e-6 is usual
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}

ARCHITECTURES = (
    Architecture(kind="llama", sharded=True, ends=2),
    Architecture(kind="llama", tied=True, pads=False),
    Architecture(kind="qwen2", tied=True, padded_vocabulary=True),
    Architecture(kind="qwen2", ends=2, pads=False),
    Architecture(kind="qwen3", changes={"head_dim": 32}, sharded=True, padded_vocabulary=True),
    Architecture(kind="mistral", changes={"head_dim": 32, "sliding_window": 16}, pads=False),
    Architecture(kind="gemma2", changes=GEMMA, tied=True, sharded=True),
    Architecture(kind="gemma3_text", changes=GEMMA, tied=True, ends=2, padded_vocabulary=True),
    Architecture(kind="phi3", changes={"original_max_position_embeddings": 256}, padded_vocabulary=True),
    Architecture(kind="olmo2", sharded=True, pads=False),
)
SHARING_ROWS = ("qwen3",)  # by two ranks, which have the one key-value head both
WITH_CRITIC = ("gemma2", "gemma3_text", "olmo2")  # transformers has no token classifier for the last two


def run_config(model: Path, *, critic: bool, shares_rows: bool = False) -> dict[str, Any]:
    """Return two steps on sampled groups and demonstrations, which change the weights of a random model."""
    return {
        "run": {"seed": 0},
        "stages": ["online"],
        "model": {"path": str(model)},
        "task": {"type": "letter_count", "min_length": 2, "max_length": 4, "alphabet": "abc"},
        "actors": {"count": 1, "max_model_len": 256, "max_num_seqs": 32, "kv_cache_gib": 0.1},
        "sampling": {"max_tokens": 24},
        "learner": {
            "ranks": 2 if shares_rows else 1,
            "sequence_parallel": 2 if shares_rows else 1,
            "zero_stage": 3 if critic else 2,
        },
        "objective": {
            # Every completion is cut off and so has a negative reward, which the critic learns.
            "policy": {"estimator": "gae" if critic else "grpo", "overlong_buffer": 16, "entropy_coef": 1e-3},
            "value": {"weight": 0.5 if critic else 0.0},
            "sft": {"weight": 1.0, "source": "demonstrations", "rows_per_step": 8},
        },
        "train": {
            "max_steps": 2,
            "groups_per_step": 2,
            "group_size": 4,
            "updates_per_step": 1,
            "optimizer": {"learning_rate": 1e-3, "warmup_updates": 0},
            "critic_optimizer": {"learning_rate": 1e-2, "warmup_updates": 0},
        },
        "checkpoint": {"interval": 2},
        "evaluation": {"prompts": 4, "samples": 1, "greedy": False},
    }


@torch.no_grad()
def policy_gap(first: Path, second: Path) -> float:
    """Return the largest difference of the log-probabilities that two policies give to some tokens, nats."""
    ids = torch.arange(5, 55)[None]
    scores = [load_model(path, "fp32", "cpu").eval()(ids, use_cache=False).logits for path in (first, second)]
    first_logprobs, second_logprobs = (each[0, :-1].log_softmax(-1) for each in scores)
    return float((first_logprobs - second_logprobs).gather(-1, ids[0, 1:, None]).abs().max())


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name.replace(" ", "-"))
def test_actors_and_learner_agree(
    architecture: Architecture, start: Callable[..., Command], tmp_path: Path, quiet_transformers: None
) -> None:
    model, run, critic = tmp_path / "model", tmp_path / "run", architecture.kind in WITH_CRITIC
    build_architecture(architecture, model)
    assert (len(list(model.glob("*.safetensors"))) > 1) == architecture.sharded
    shares_rows = architecture.kind in SHARING_ROWS
    config = write_config(tmp_path, run_config(model, critic=critic, shares_rows=shares_rows))
    start("train", config).finish().assert_gone(within_s=5)
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["step"] > 0]
    assert [row["weights/version"] for row in rows] == [1, 2]
    gap = max(row[name] for row in rows for name in ("weights/probe_gap_max", "learner/logprob_gap_max"))
    assert gap <= ROUNDING
    # A publish that had changed nothing would not have passed.
    assert policy_gap(model, last_checkpoint(run) / "policy") > 1000 * ROUNDING
    assert (last_checkpoint(run) / "critic" / "model.safetensors").is_file() == critic
    if os.environ.get(VARIABLE):
        write_row(PAGE, row_of(architecture, gap, critic=critic))


@pytest.mark.parametrize("kind", ["gemma3_text"])
def test_a_critic_of_its_own_class_is_resumed(kind: str, start: Callable[..., Command], tmp_path: Path) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    build_architecture(next(each for each in ARCHITECTURES if each.kind == kind), model)
    config = write_config(tmp_path, run_config(model, critic=True))
    start("train", config).finish()
    start("train", config, "train.max_steps=3", "learner.zero_stage=2").finish().assert_gone(within_s=5)
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["step"] > 0]
    assert [row["weights/version"] for row in rows] == [1, 2, 3]
    # A new critic would have the loss of the first step again.
    losses = [row["objective/value_loss"] for row in rows]
    assert losses[2] < losses[1] < losses[0]
    assert max(row["weights/probe_gap_max"] for row in rows) <= ROUNDING


HEADINGS = (
    "model",
    "output layer",
    "weight files",
    "end tokens",
    "padding token",
    "vocabulary",
    "critic",
    "largest gap, nats",
)


def row_of(architecture: Architecture, gap: float, *, critic: bool) -> tuple[str, ...]:
    """Return the cells of an architecture's row."""
    return (
        architecture.kind + (", sliding window" if "sliding_window" in architecture.changes else ""),
        "tied" if architecture.tied else "untied",
        "sharded" if architecture.sharded else "single",
        str(architecture.ends),
        "yes" if architecture.pads else "none",
        "padded" if architecture.padded_vocabulary else "the tokenizer's",
        "yes" if critic else "",
        f"{gap:.1e}",
    )


def write_row(page: Path, cells: tuple[str, ...]) -> None:
    """Replace the row with the same model and output layer, or add one. The rows of the page's table are sorted."""
    lines = page.read_text().splitlines()
    table = [number for number, line in enumerate(lines) if line.startswith("|")]
    rows = {tuple(_cells(lines[number])[:2]): _cells(lines[number]) for number in table[2:]}
    rows[cells[:2]] = list(cells)
    made = [HEADINGS, ["---"] * len(HEADINGS), *(rows[key] for key in sorted(rows))]
    lines[table[0] : table[-1] + 1] = ["| " + " | ".join(row) + " |" for row in made]
    temporary = page.with_name(f".{page.name}.{os.getpid()}")
    temporary.write_text("\n".join(lines) + "\n")
    temporary.replace(page)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
