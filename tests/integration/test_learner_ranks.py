"""DeepSpeed ranks in plain processes: partitioning, saving and resuming do not change what is learned."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learner_child import CRITIC, KEPT, OBJECTIVE, PROMPT, TEMPERATURE, batch, digests, token_values
from safetensors.numpy import load_file

from rlsys.config.schema import FromScratchConfig, OptimizerConfig
from rlsys.run.metrics import METRICS

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
ROUNDING = 4e-5  # relative; AdamW enlarges that of small gradients, and processors differ
HERE = Path(__file__).parent
# Every one is trained undisturbed, and again from its half-way checkpoint.
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"zero_stage": stage} for stage in (2, 3)},
    "bf16-1": {"zero_stage": 1, "dtype": "bf16"},
}
# The same with a critic, which is a second model under DeepSpeed.
CRITICS: dict[str, dict[str, Any]] = {"critic3": {"zero_stage": 3}}
# Further variants of the same kind, only in `make test-long`.
MORE: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"zero_stage": stage} for stage in (0, 1)},
    **{f"offload{stage}": {"zero_stage": stage, "optimizer_offload": True} for stage in (1, 2, 3)},
    **{f"bf16-{stage}": {"zero_stage": stage, "dtype": "bf16"} for stage in (2, 3)},
    **{f"critic{stage}": {"zero_stage": stage} for stage in (0, 1, 2)},
}
# Two ranks that share every row, and the ZeRO stage beside it.
SEQUENCES: dict[str, dict[str, Any]] = {
    "sequence3": {"zero_stage": 3, "sequence_parallel": 2, "gradient_checkpointing": True},
    "sequence0": {"zero_stage": 0, "sequence_parallel": 2},
}
# One joint update against plain torch: ranks, partitioning, micro-batches, and clipping that bites or does not.
PLAIN: dict[str, dict[str, Any]] = {
    "one-small": {"ranks": 1, "zero_stage": 0, "micro_batch_tokens": 64, "max_grad_norm": 100.0},
    "one-large": {"ranks": 1, "zero_stage": 2, "micro_batch_tokens": 4096, "max_grad_norm": 0.05},
    "two-small": {"ranks": 2, "zero_stage": 1, "micro_batch_tokens": 64, "max_grad_norm": 100.0},
    "two-middle": {"ranks": 2, "zero_stage": 0, "micro_batch_tokens": 200, "max_grad_norm": 0.05},
    "two-large": {"ranks": 2, "zero_stage": 3, "micro_batch_tokens": 4096, "max_grad_norm": 100.0},
    "two-sequence": {
        "ranks": 2,
        "zero_stage": 2,
        "micro_batch_tokens": 64,
        "max_grad_norm": 0.05,
        "sequence_parallel": 2,
    },
}
# An epsilon near the size of the gradients: with the usual one Adam's first update hardly knows their scale.
PLAIN_OPTIMIZER = {"learning_rate": 1e-2, "eps": 1e-3, "weight_decay": 0.1, "warmup_updates": 0}
PLAIN_STEP = 1
LAYOUT = {"learner/padding_share", "learner/tokens"}  # figures that depend on which samples share a row
IMPORTANCE_CAP = 2.0  # policy.importance_cap as it is shipped


def variants(*kinds: str) -> list[Any]:
    """Return the names of variants with one of these prefixes, as parameters of a test."""
    quick = [name for name in (*VARIANTS, *CRITICS) if name.startswith(kinds)]
    return [*quick, *(pytest.param(name, marks=pytest.mark.long) for name in MORE if name.startswith(kinds))]


def run_ranks(folder: Path, *groups: Mapping[str, tuple[int, list[Any]]], child: str = "learner_child.py") -> None:
    """Run groups of learners one after the other: name to ranks and jobs. Every rank is a process and must end well."""
    arguments = []
    for group in groups:
        for name, (ranks, jobs) in group.items():
            (folder / f"{name}.json").write_text(json.dumps(jobs))
            arguments += [str(ranks), str(folder / f"{name}.json")]
        arguments.append("then")
    names = [name for group in groups for name in group]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    # No pipes: the ranks wait for each other, and one whose warnings fill a pipe would wait for its reader.
    with (folder / f"{'-'.join(names)}.errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(HERE / child), *arguments[:-1]],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
    try:
        code = process.wait(timeout=1200)
        said = "\n".join(path.read_text() for name in names for path in folder.glob(f"*{name}*.errors"))
        assert code == 0, said
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of all jobs.

    One rank at ZeRO 0 and three at ZeRO 3 continue the half-way checkpoint of two ranks at ZeRO 2.
    """
    folder = tmp_path_factory.mktemp("ranks")
    build_models(folder)
    two = jobs(folder, {**VARIANTS, **CRITICS})
    two.append(whole(folder, "checkpointing", zero_stage=2, gradient_checkpointing=True))
    two += [whole(folder, name, **learner) for name, learner in SEQUENCES.items()]
    two.append({**whole(folder, "sequence-critic", zero_stage=1, sequence_parallel=2), "objective": CRITIC})
    one = [resumed(folder, "one", "zero2", zero_stage=0), whole(folder, "one", zero_stage=0)]
    one.append({**whole(folder, "one-critic", zero_stage=0), "objective": CRITIC})
    for name, variant in PLAIN.items():
        (one if variant["ranks"] == 1 else two).append(plain_job(folder, name, variant))
    three = [resumed(folder, "three", "zero2", zero_stage=3)]
    four = [{**whole(folder, "two-groups", zero_stage=3, sequence_parallel=2), "objective": CRITIC}]
    run_ranks(folder, {"two": (2, two)}, {"one": (1, one), "three": (3, three), "four": (4, four)})
    return folder


@pytest.fixture(scope="module")
def finished_more(finished: Path) -> None:
    """The results of MORE beside the others."""
    run_ranks(finished, {"more": (2, jobs(finished, MORE))})


@pytest.fixture
def folder(finished: Path, request: pytest.FixtureRequest) -> Path:
    if request.node.get_closest_marker("long"):
        request.getfixturevalue("finished_more")
    return finished


def jobs(folder: Path, variants: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Train every variant undisturbed, then with spoiled steps, and resume it from half-way."""
    found = []
    for name, learner in variants.items():
        critic = name.startswith("critic")
        spoiled = {"spoil": "critic" if critic else "policy", "spoiled": f"{folder}/{name}-spoiled"}
        for job in ({**whole(folder, name, **learner), **spoiled}, resumed(folder, name, name, **learner)):
            found.append({**job, "objective": {**job["objective"], **CRITIC}} if critic else job)
    return found


def whole(folder: Path, name: str, **learner: Any) -> dict[str, Any]:
    saved = {"1": f"{folder}/{name}-half", "2": f"{folder}/{name}-whole"}
    model = str(folder / "model")
    return {"model": model, "learner": learner, "objective": {}, "first": 0, "last": 2, "save": saved}


def resumed(folder: Path, name: str, half: str, **learner: Any) -> dict[str, Any]:
    """Without measuring the gradients of every term, which must not change anything."""
    saved = {"2": f"{folder}/{name}-resumed"}
    resume, objective = f"{folder}/{half}-half", {"grad_norm_interval": 0}
    return {**whole(folder, name, **learner), "objective": objective, "first": 1, "resume": resume, "save": saved}


def build_models(folder: Path) -> None:
    """The policy and, as the reference, other weights."""
    from rlsys.models.scratch import build_from_scratch

    # Tied embeddings, and vocabulary enough for token ids below 60.
    size = FromScratchConfig(hidden_size=64, layers=2, heads=2, intermediate_size=128, max_positions=64)
    for seed, name in enumerate(("model", "other")):
        build_from_scratch(size, ("<answer>", "</answer>"), seed, folder / name)
        # Dropout that a learner must ignore: with it no result below could be equal to another.
        path = folder / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.1}))


def plain_job(folder: Path, name: str, variant: dict[str, Any]) -> dict[str, Any]:
    learner = {key: value for key, value in variant.items() if key not in ("ranks", "max_grad_norm")}
    return {
        "model": str(folder / "model"),
        "reference": str(folder / "other"),
        "learner": learner,
        "optimizer": {**PLAIN_OPTIMIZER, "max_grad_norm": variant["max_grad_norm"]},
        "objective": {},
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


def figures(folder: Path, name: str) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / name / "figures.json").read_text())
    return found


@pytest.mark.parametrize("name", variants("zero", "offload", "bf16", "critic"))
def test_resumed_equals_undisturbed_byte_for_byte(folder: Path, name: str) -> None:
    found, expected = digests(folder / f"{name}-resumed"), digests(folder / f"{name}-whole")
    assert {"policy/model.safetensors", "learner/exp_avg.safetensors"} <= set(expected)
    critics = {"critic/model.safetensors", "critic_learner/exp_avg_sq.safetensors", "critic_learner/learner.json"}
    assert (critics <= set(expected)) == name.startswith("critic")
    assert found == expected
    half = digests(folder / f"{name}-half")
    assert all(half[file] != expected[file] for file in expected if file.endswith(".safetensors"))
    values = (np.concatenate(token_values(folder / f"{name}-{end}"), axis=1) for end in ("resumed", "whole"))
    np.testing.assert_array_equal(*values)
    # And the figures, but for those that only the undisturbed run measured.
    own, others = figures(folder, f"{name}-resumed"), figures(folder, f"{name}-whole")
    assert all("_grad_" in key for key in others.keys() ^ own.keys())
    assert own == {key: others[key] for key in own}


@pytest.mark.parametrize("name", variants("zero", "offload", "bf16", "critic"))
def test_what_is_not_finite_changes_nothing(folder: Path, name: str) -> None:
    # The ranks themselves have checked that all of them raised.
    assert digests(folder / f"{name}-spoiled") == digests(folder / f"{name}-whole")


@pytest.mark.parametrize("name", [*variants("zero", "offload"), "checkpointing", *SEQUENCES])
def test_every_way_to_save_memory_makes_the_same_update(folder: Path, name: str) -> None:
    # fp32 sums of other orders differ by about 1e-7 each; Adam divides tiny gradients by their own size.
    assert relative(change(folder, f"{name}-whole"), change(folder, "one-whole")) < ROUNDING
    found, expected = figures(folder, f"{name}-whole"), figures(folder, "one-whole")
    # ZeRO 3 holds no layer whole to measure; packing and padding depend on the ranks.
    missing = {key for key in expected if "_grad_" in key} if name.endswith("3") else set()
    assert set(found) == set(expected) - missing
    for key in found.keys() - LAYOUT:
        assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-7), key


def test_every_figure_is_registered(folder: Path) -> None:
    for name in ("one-whole", "critic3-whole"):
        found = figures(folder, name)
        assert set(found) <= set(METRICS)
        assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("name", variants("critic"))
def test_a_critic_begins_with_zero(folder: Path, name: str) -> None:
    found = figures(folder, f"{name}-half")
    # It explains nothing yet: the variance of the returns less 0 is that of the returns.
    assert (found["value/mean"], found["value/explained_variance"]) == (0.0, 0.0)
    assert figures(folder, f"{name}-whole")["value/mean"] != 0.0


def critic_change(folder: Path, name: str) -> np.ndarray:
    """`change` of the critic, which begins as the policy's model with an output of 0."""
    before = load_file(folder / "model" / "model.safetensors")
    after = load_file(folder / name / "critic" / "model.safetensors")
    assert len(after.keys() & before.keys()) > 10
    assert all(key.startswith("score.") for key in after.keys() - before.keys())
    return np.concatenate([(after[key].astype(np.float64) - before.get(key, 0)).ravel() for key in sorted(after)])


@pytest.mark.parametrize("name", [*variants("critic"), "sequence-critic", "two-groups"])
def test_ranks_and_partitioning_do_not_change_what_a_critic_learns(folder: Path, name: str) -> None:
    assert relative(critic_change(folder, f"{name}-whole"), critic_change(folder, "one-critic-whole")) < ROUNDING
    assert relative(change(folder, f"{name}-whole"), change(folder, "one-critic-whole")) < ROUNDING
    found, expected = figures(folder, f"{name}-whole"), figures(folder, "one-critic-whole")
    assert {"objective/value_loss", "objective/value_grad_norm", "value/explained_variance"} <= found.keys()
    for key in found.keys() - LAYOUT:
        assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-7), key


@pytest.mark.parametrize("name", ["zero2", "zero3", "sequence3", "sequence0", "two-groups"])
def test_the_rank_that_has_a_row_returns_the_values_of_its_tokens(folder: Path, name: str) -> None:
    one = "one-critic" if name == "two-groups" else "one"
    values, expected = (token_values(folder / f"{each}-whole") for each in (name, one))
    for found, others, (group, number) in zip(values, expected, KEPT, strict=True):
        np.testing.assert_allclose(found, others, rtol=1e-3, atol=1e-4)
        mask = batch(1).groups[group].trajectories[number].loss_mask
        assert (~np.isnan(found)).tolist() == [mask.tolist()] * 2
        if one == "one":  # rewards 0, 1, 0, 1: mean 1/2, std 0.57735
            assert set(found[0, mask].round(4)) == {0.866 if number % 2 else -0.866}


@pytest.mark.parametrize("ranks", ["one", "three"])
def test_other_ranks_at_another_zero_stage_continue(folder: Path, ranks: str) -> None:
    # Three ranks do not divide a parameter evenly.
    assert relative(change(folder, f"{ranks}-resumed"), change(folder, "zero2-whole")) < ROUNDING
    for key in ("exp_avg", "exp_avg_sq"):
        found, expected = (
            load_file(folder / n / "learner" / f"{key}.safetensors") for n in (f"{ranks}-resumed", "zero2-whole")
        )
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert relative(found[name].ravel(), value.ravel()) < ROUNDING, name
    # Two steps of two updates.
    assert json.loads((folder / f"{ranks}-resumed" / "learner" / "learner.json").read_text())["updates"] == 4


@pytest.mark.parametrize("name", variants("bf16"))
def test_bf16_keeps_fp32_masters_and_stays_near_fp32(folder: Path, name: str) -> None:
    masters = load_file(folder / f"{name}-whole" / "learner" / "master.safetensors")
    assert {value.dtype for value in masters.values()} == {np.dtype("float32")}
    before = load_file(folder / "model" / "model.safetensors")
    found = np.concatenate([(masters[key] - before[key]).ravel() for key in sorted(before)])
    expected = change(folder, "zero2-whole")
    # bf16 has 8 bits of mantissa: the updates point the same way, they are not equal.
    assert found @ expected / (np.linalg.norm(found) * np.linalg.norm(expected)) > 0.99


def plain_loss(policy: Any, reference: Any) -> Any:
    """Return the joint loss of one update in plain torch, row by row, from all logits.

    Args:
        policy, reference: return the output of a model for token ids, [1, T].
    """
    import torch
    from torch.nn.functional import logsigmoid

    given = batch(PLAIN_STEP)

    def logprobs(model: Any, tokens: Any, start: int, temperature: float = 1.0) -> Any:
        """Return the log-probabilities of the tokens from `start` on."""
        ids = torch.tensor(tokens, dtype=torch.int64)[None]
        found = torch.log_softmax(model(ids).logits[0, :-1] / temperature, dim=-1)
        return found.gather(-1, ids[0, 1:, None])[start - 1 :, 0]

    terms = {name: torch.zeros(()) for name in ("policy", "kl", "preference", "sft")}
    tokens = imitated = 0
    for group, row in ((each, row) for each in given.groups for row in each.trajectories):
        rewards = torch.tensor([sibling.reward for sibling in group.trajectories], dtype=torch.float64)
        advantage = float((row.reward - rewards.mean()) / (rewards.std() + 1e-6))
        own = logprobs(policy, row.token_ids, PROMPT, TEMPERATURE)
        gap = logprobs(reference, row.token_ids, PROMPT, TEMPERATURE).detach() - own
        ratio = torch.exp(own - own.detach())  # 1: the first update starts from the old policy
        weight = torch.exp(own.detach() - torch.tensor(row.behavior_logprobs[PROMPT:])).clamp(max=IMPORTANCE_CAP)
        terms["policy"] = terms["policy"] - (weight * ratio * advantage).sum()
        terms["kl"] = terms["kl"] + (torch.exp(gap) - gap - 1).clamp(max=10.0).sum()
        tokens += len(own)
    settings = OBJECTIVE["preference"]
    for pair in given.pairs:
        chosen = logprobs(policy, pair.chosen_ids, pair.prompt_length)
        terms["sft"] = terms["sft"] - chosen.sum()
        imitated += len(chosen)
        # From the first token on in which they differ.
        chosen = chosen[pair.common - pair.prompt_length :].sum() - pair.chosen_reference
        rejected = logprobs(policy, pair.rejected_ids, pair.common).sum() - pair.rejected_reference
        logit, wrong = settings["beta"] * (chosen - rejected), settings["label_smoothing"]
        terms["preference"] = terms["preference"] - (1 - wrong) * logsigmoid(logit) - wrong * logsigmoid(-logit)
    for row in given.demonstrations:
        found = logprobs(policy, row.token_ids, PROMPT)
        terms["sft"] = terms["sft"] - found.sum()
        imitated += len(found)
    counts = {"policy": tokens, "kl": tokens, "preference": len(given.pairs), "sft": imitated}
    return sum(OBJECTIVE.get(name, {}).get("weight", 1.0) * terms[name] / counts[name] for name in terms)


def plain_step(parameters: list[Any], max_grad_norm: float) -> float:
    """Make one optimizer step in plain torch and return the gradient norm before clipping."""
    import torch

    norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))
    settings = OptimizerConfig(**PLAIN_OPTIMIZER)
    torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    ).step()
    return norm


def plain_update(folder: Path, max_grad_norm: float) -> tuple[float, np.ndarray]:
    """Gradient norm and changed parameters of one joint update in plain torch."""
    from transformers import AutoModelForCausalLM

    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in ("model", "other"))
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    plain_loss(policy, reference).backward()
    norm = plain_step(list(policy.parameters()), max_grad_norm)
    after = dict(policy.named_parameters())
    return norm, np.concatenate([(after[key] - before[key]).detach().double().ravel() for key in sorted(before)])


@pytest.mark.parametrize("name", PLAIN)
def test_an_update_is_that_of_plain_torch(folder: Path, name: str) -> None:
    limit = PLAIN[name]["max_grad_norm"]
    norm, expected = plain_update(folder, limit)
    found = figures(folder, name)
    assert (norm > limit) == (limit < 1)  # clipping acts in exactly the cases meant for it
    assert found["learner/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert found["learner/kl"] > 0.01
    assert relative(change(folder, name), expected) < 1e-4
