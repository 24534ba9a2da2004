"""DeepSpeed ranks in plain processes: partitioning, saving and resuming do not change what is learned."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learner_child import CRITIC, KL_COEF, TEMPERATURE, online_groups
from safetensors.numpy import load_file

from rlsys.config import FromScratchConfig, OptimizerConfig

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
ZERO_STAGES = (0, 1, 2, 3)
# Every one is trained undisturbed, and again from its half-way checkpoint.
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"zero_stage": stage} for stage in ZERO_STAGES},
    **{f"offload{stage}": {"zero_stage": stage, "optimizer_offload": True} for stage in (1, 2, 3)},
    **{f"bf16-{stage}": {"zero_stage": stage, "dtype": "bf16"} for stage in (1, 2, 3)},
}
# The same with a critic, which is a second model under DeepSpeed.
CRITICS: dict[str, dict[str, Any]] = {f"critic{stage}": {"zero_stage": stage} for stage in (1, 3)}
# One online update against plain torch: ranks, partitioning, micro-batches, and clipping that bites or does not.
PLAIN: dict[str, dict[str, Any]] = {
    "one-small": {"ranks": 1, "zero_stage": 0, "micro_batch_tokens": 64, "max_grad_norm": 100.0},
    "one-large": {"ranks": 1, "zero_stage": 2, "micro_batch_tokens": 4096, "max_grad_norm": 0.05},
    "two-small": {"ranks": 2, "zero_stage": 1, "micro_batch_tokens": 64, "max_grad_norm": 100.0},
    "two-middle": {"ranks": 2, "zero_stage": 0, "micro_batch_tokens": 200, "max_grad_norm": 0.05},
    "two-large": {"ranks": 2, "zero_stage": 3, "micro_batch_tokens": 4096, "max_grad_norm": 100.0},
}
# An epsilon near the size of the gradients: with the usual one Adam's first update hardly knows their scale.
PLAIN_OPTIMIZER = {"learning_rate": 1e-2, "eps": 1e-3, "weight_decay": 0.1, "warmup_updates": 0}
PLAIN_STEP = 1
IMPORTANCE_CAP = 2.0  # policy.importance_cap as it is shipped


def run_ranks(folder: Path, name: str, ranks: int, jobs: list[dict[str, Any]]) -> None:
    """Run jobs on so many ranks; every rank must end well."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "learner_child.py"), str(rank), str(ranks), str(path)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * ranks, "\n".join(errors)
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of all jobs: one pair of processes makes those of two ranks, one process those of one.

    One rank at ZeRO 0 and three at ZeRO 3 continue the half-way checkpoint of two ranks at ZeRO 2.
    """
    folder = tmp_path_factory.mktemp("ranks")
    build_models(folder)
    model = str(folder / "model")

    def whole(name: str, **learner: Any) -> dict[str, Any]:
        saved = {"2": f"{folder}/{name}-half", "4": f"{folder}/{name}-whole"}
        return {"model": model, "learner": learner, "first": 0, "last": 4, "save": saved}

    def resumed(name: str, half: str, **learner: Any) -> dict[str, Any]:
        saved = {"4": f"{folder}/{name}-resumed"}
        resume = f"{folder}/{half}-half"
        return {"model": model, "learner": learner, "first": 2, "last": 4, "resume": resume, "save": saved}

    two = [make(name, **learner) for name, learner in VARIANTS.items() for make in (whole, partial(resumed, half=name))]
    for name, learner in CRITICS.items():
        two += [{**job, "objective": CRITIC} for job in (whole(name, **learner), resumed(name, name, **learner))]
    two.append(whole("checkpointing", zero_stage=2, gradient_checkpointing=True))
    one = [resumed("one", "zero2", zero_stage=0), whole("one", zero_stage=0)]
    for name, variant in PLAIN.items():
        (one if variant["ranks"] == 1 else two).append(plain_job(folder, name, variant))
    run_ranks(folder, "two", 2, two)
    run_ranks(folder, "one", 1, one)
    run_ranks(folder, "three", 3, [resumed("three", "zero2", zero_stage=3)])
    return folder


def build_models(folder: Path) -> None:
    """The policy and, as the reference, other weights."""
    from rlsys.models import build_from_scratch

    # Tied embeddings, and vocabulary enough for token ids below 60.
    size = FromScratchConfig(hidden_size=64, layers=2, heads=2, intermediate_size=128, max_positions=64)
    for seed, name in enumerate(("model", "other")):
        build_from_scratch(size, ("<answer>", "</answer>"), seed, folder / name)
        # Dropout that a learner must ignore: with it no result below could be equal to another.
        path = folder / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.1}))


def plain_job(folder: Path, name: str, variant: dict[str, Any]) -> dict[str, Any]:
    learner = {key: variant[key] for key in ("zero_stage", "micro_batch_tokens")}
    return {
        "model": str(folder / "model"),
        "reference": str(folder / "other"),
        "learner": learner,
        "optimizer": {**PLAIN_OPTIMIZER, "max_grad_norm": variant["max_grad_norm"]},
        "first": PLAIN_STEP,
        "last": PLAIN_STEP + 1,
        "updates": 1,
        "save": {str(PLAIN_STEP + 1): f"{folder}/{name}"},
    }


def change(folder: Path, name: str) -> np.ndarray:
    """All parameters of a result minus those of the initial model, as one vector."""
    before = load_file(folder / "model" / "model.safetensors")
    after = load_file(folder / name / "policy" / "model.safetensors")
    assert set(after) == set(before)
    return np.concatenate([(after[key].astype(np.float64) - before[key]).ravel() for key in sorted(before)])


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected|, of vectors."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def digests(checkpoint: Path) -> dict[str, str]:
    return {
        str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(checkpoint.rglob("*"))
        if path.suffix in (".safetensors", ".json")
    }


@pytest.mark.parametrize("name", [*VARIANTS, *CRITICS])
def test_resumed_equals_undisturbed_byte_for_byte(folder: Path, name: str) -> None:
    found, expected = digests(folder / f"{name}-resumed"), digests(folder / f"{name}-whole")
    assert {"policy/model.safetensors", "learner/exp_avg.safetensors", "figures.json"} <= set(expected)
    assert found == expected
    assert digests(folder / f"{name}-half")["policy/model.safetensors"] != expected["policy/model.safetensors"]


@pytest.mark.parametrize("name", [*(name for name in VARIANTS if "bf16" not in name), "checkpointing"])
def test_every_way_to_save_memory_makes_the_same_update(folder: Path, name: str) -> None:
    # fp32 sums of other orders differ by about 1e-7 each; Adam divides tiny gradients by their own size.
    assert relative(change(folder, f"{name}-whole"), change(folder, "one-whole")) < 2e-5
    found, expected = (json.loads((folder / f"{n}-whole" / "figures.json").read_text()) for n in (name, "one"))
    names = ("objective/sft_loss", "objective/preference_loss", "learner/loss", "learner/kl", "learner/grad_norm")
    for key in (*names, "learner/entropy", "preference/margin"):
        assert found[key] == pytest.approx(expected[key], rel=2e-5, abs=1e-8), key


@pytest.mark.parametrize("ranks", ["one", "three"])
def test_other_ranks_at_another_zero_stage_continue(folder: Path, ranks: str) -> None:
    # Three ranks do not divide a parameter evenly.
    assert relative(change(folder, f"{ranks}-resumed"), change(folder, "zero2-whole")) < 2e-5
    for key in ("exp_avg", "exp_avg_sq"):
        found, expected = (
            load_file(folder / n / "learner" / f"{key}.safetensors") for n in (f"{ranks}-resumed", "zero2-whole")
        )
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert relative(found[name].ravel(), value.ravel()) < 2e-5, name
    # Four steps of two updates.
    assert json.loads((folder / f"{ranks}-resumed" / "learner" / "learner.json").read_text())["updates"] == 8


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_keeps_fp32_masters_and_stays_near_fp32(folder: Path, stage: int) -> None:
    masters = load_file(folder / f"bf16-{stage}-whole" / "learner" / "master.safetensors")
    assert {value.dtype for value in masters.values()} == {np.dtype(np.float32)}
    before = load_file(folder / "model" / "model.safetensors")
    found = np.concatenate([(masters[key] - before[key]).ravel() for key in sorted(before)])
    expected = change(folder, "zero2-whole")
    # bf16 has 8 bits of mantissa: the updates point the same way, they are not equal.
    assert found @ expected / (np.linalg.norm(found) * np.linalg.norm(expected)) > 0.99


def plain_update(folder: Path, max_grad_norm: float) -> tuple[float, np.ndarray]:
    """Gradient norm and changed parameters of one GRPO update in plain torch, row by row, all logits."""
    import torch
    from transformers import AutoModelForCausalLM

    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in ("model", "other"))
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    trajectories = [(group, row) for group in online_groups(PLAIN_STEP) for row in group.trajectories]
    tokens = sum(int(row.loss_mask.sum()) for _, row in trajectories)
    for group, row in trajectories:
        rewards = torch.tensor([sibling.reward for sibling in group.trajectories], dtype=torch.float64)
        advantage = float((row.reward - rewards.mean()) / (rewards.std() + 1e-6))
        ids = torch.tensor(row.token_ids, dtype=torch.int64)[None]
        mask = torch.tensor(row.loss_mask)[1:]
        logprobs, anchor = (
            torch.log_softmax(model(ids).logits[0, :-1] / TEMPERATURE, dim=-1)[torch.arange(len(mask)), ids[0, 1:]][
                mask
            ]
            for model in (policy, reference)
        )
        ratio = torch.exp(logprobs - logprobs.detach())  # 1: the first update starts from the old policy
        gap = anchor.detach() - logprobs
        behavior = torch.tensor(row.behavior_logprobs)[1:][mask]
        weight = torch.exp(logprobs.detach() - behavior).clamp(max=IMPORTANCE_CAP)
        loss = (-weight * ratio * advantage + KL_COEF * (torch.exp(gap) - gap - 1)).sum() / tokens
        loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm))
    settings = OptimizerConfig(**PLAIN_OPTIMIZER)
    torch.optim.AdamW(
        policy.parameters(),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    ).step()
    after = dict(policy.named_parameters())
    return norm, np.concatenate([(after[key] - before[key]).detach().double().ravel() for key in sorted(before)])


@pytest.mark.parametrize("name", PLAIN)
def test_an_update_is_that_of_plain_torch(folder: Path, name: str) -> None:
    limit = PLAIN[name]["max_grad_norm"]
    norm, expected = plain_update(folder, limit)
    figures = json.loads((folder / name / "figures.json").read_text())
    assert (norm > limit) == (limit < 1)  # clipping acts in exactly the cases meant for it
    assert figures["learner/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert figures["learner/kl"] > 0.01
    assert relative(change(folder, name), expected) < 1e-4
