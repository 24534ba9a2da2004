"""The softened policy as its own teacher: temperatures against a search over a grid, numbers by hand, and the term."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from plain_rank import RATE, build, chain, distribution, plain_rank
from torch import Tensor
from transformers import Qwen2ForCausalLM

from learners.language_model import LanguageModel
from learners.objective.curiosity import curious_loss, softened_logprobs, temperatures
from learners.objective.logprobs import token_logprobs
from learners.samples.types import PackItem
from rlsys.config.objective import ObjectiveConfig
from rlsys.types import TrainingBatch
from tests.helpers.joint_samples import one_by_one, planned, sft_sample, update


def entropy(p: np.ndarray) -> float:
    return float(-(p * np.log(p)).sum())


def at_temperature(p: np.ndarray, tau: float) -> np.ndarray:
    raised = p ** (1 / tau)
    return raised / raised.sum()


def searched(p: np.ndarray) -> float:
    """Return the temperature of a grid whose entropy is nearest to the wanted one."""
    if entropy(p) <= 0.03:
        return 1.1
    wanted = entropy(p) + 0.5 / (1 + math.exp(-2 * (entropy(p) - 1.2)))
    if entropy(at_temperature(p, 1.5)) < wanted:
        return 1.5
    grid = np.linspace(1.1, 1.5, 40_001)
    return float(min(grid, key=lambda tau: abs(entropy(at_temperature(p, tau)) - wanted)))


ROWS = [
    np.array([0.7, 0.2, 0.06, 0.04]),
    np.array([0.5, 0.3, 0.15, 0.05]),
    np.array([0.9, 0.05, 0.03, 0.02]),
    np.array([0.998, 0.001, 0.0006, 0.0004]),  # an entropy of 0.016
    np.array([0.25, 0.25, 0.25, 0.25]),  # cannot become more uncertain
]


def test_temperatures_are_those_of_a_search() -> None:
    found = temperatures(torch.tensor(np.stack(ROWS)).log())
    assert found.tolist() == pytest.approx([searched(row) for row in ROWS], abs=2e-5)
    assert found[3] == 1.1 and found[4].item() == pytest.approx(1.5, abs=1e-6)
    assert 1.1 < found[0] < 1.5


def test_softened_log_probabilities_by_hand() -> None:
    # The uniform policy stays uniform. The certain one has probabilities p^(1 / 1.1), renormalised.
    rows = torch.tensor(np.stack(ROWS[3:])).log().requires_grad_()
    found = softened_logprobs(rows, torch.tensor([1, 2]))
    expected = [math.log(at_temperature(ROWS[3], 1.1)[1]), math.log(0.25)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6) and not found.requires_grad


def test_a_large_vocabulary_has_entropies_over_its_first_512_tokens() -> None:
    p = np.concatenate([np.full(512, 0.9 / 512), np.full(600, 0.1 / 600)])
    first = np.full(512, 1 / 512)
    found = temperatures(torch.tensor(p).log()[None])
    assert found.item() == pytest.approx(searched(first), abs=1e-6)


def test_the_loss_and_its_gradient_by_hand() -> None:
    own = torch.tensor([math.log(0.8), math.log(0.2)], dtype=torch.float64, requires_grad=True)
    softened, weights = torch.tensor([0.6, 0.3], dtype=torch.float64).log(), torch.tensor([0.5, 0.25])
    loss = curious_loss(own, softened, weights, weight=2.0)
    gaps = [math.log(0.8 / 0.6), math.log(0.2 / 0.3)]
    assert loss.item() == pytest.approx(0.5 * gaps[0] ** 2 + 0.25 * gaps[1] ** 2, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, own)
    assert gradient.tolist() == pytest.approx([2 * 0.5 * gaps[0], 2 * 0.25 * gaps[1]], abs=1e-12)


def test_log_probabilities_keep_their_values_and_gradients() -> None:
    logits = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets, ones, at = torch.tensor([1, 2, 3, 4]), torch.ones(4), torch.tensor([True, False, False, True])
    plain, *_ = token_logprobs(logits, targets, ones)
    own, _, _, softened = token_logprobs(logits, targets, ones, softened_at=at)
    assert torch.equal(own, plain)
    torch.testing.assert_close(softened, softened_logprobs(logits[at].log_softmax(-1), targets[at]))
    pair = [torch.autograd.grad(each.sum(), logits)[0] for each in (plain, own)]
    assert torch.equal(*pair)


@pytest.mark.parametrize("parts", [1, 3, 9])
def test_the_model_softens_the_same_targets_in_any_parts(parts: int) -> None:
    model = LanguageModel(build(Qwen2ForCausalLM, 0))
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    at = torch.tensor([True, False, True, True, False])
    given = {"targets": torch.arange(5), "target_ids": ids[0, 1:], "temperature": torch.ones(5)}
    found = model(input_ids=ids, parts=parts, softened_at=at, **given)[3]
    whole = distribution(model.module, ids[0].tolist())
    torch.testing.assert_close(found, softened_logprobs(whole[at], ids[0, 1:][at]), rtol=0, atol=1e-9)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", ["sft", "warm_start", "online"])
def test_a_step_goes_down_the_gradient_of_likelihood_and_square(stage: Any) -> None:
    objective = {
        "policy": {"weight": 0.0},
        "sft": {"weight": 1.0, "source": "demonstrations", "curiosity": 0.5},
    }
    rank, rows = plain_rank(objective, stage=stage), ([5, 6, 7], [5, 6, 7, 8, 9])
    module = build(Qwen2ForCausalLM, 0)
    losses: list[Tensor] = []
    for tokens in rows:
        whole = distribution(module, tokens)
        own = whole.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
        losses.append(-own + 0.25 * (own - softened_logprobs(whole, torch.tensor(tokens[1:]))).square())
    loss = torch.cat(losses).mean()
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    metrics = rank.train(TrainingBatch(demonstrations=tuple(chain(tokens, 1) for tokens in rows)), 0, 1)
    assert metrics["objective/sft_loss"] == pytest.approx(loss.item(), rel=1e-6)
    moved = [p.detach() - RATE * g for p, g in zip(module.parameters(), gradients, strict=True)]
    torch.testing.assert_close(rank.policy.vector(), torch.cat([p.flatten() for p in moved]), rtol=0, atol=1e-7)


def test_ranks_and_micro_batches_change_nothing() -> None:
    rows = ([1, 2, 3, 4, 5], [2, 4, 6], [6, 5, 4, 3], [7, 1])
    items = [PackItem(samples=(sft_sample(row, [0] + [1] * (len(row) - 1)),)) for row in rows]
    losses, vectors = [], []
    for plan in (one_by_one(items), planned(items, 1, 1000), planned(items, 2, 6), planned(items, 3, 5)):
        objective = ObjectiveConfig.model_validate({"sft": {"weight": 1.0, "curiosity": 1.0}})
        found, gradient = update(items, objective, weights={"sft": 1.0}, plan=plan)
        losses.append(found["sft"])
        vectors.append(gradient)
    plain, _ = update(items, ObjectiveConfig(), weights={"sft": 1.0})
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-9) and losses[0] > plain["sft"] + 1e-4
    for vector in vectors[1:]:
        torch.testing.assert_close(vector, vectors[0], rtol=0, atol=1e-9)
