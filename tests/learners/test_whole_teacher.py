"""A teacher of the whole vocabulary that the learner holds, against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_rank import RATE, SIZE, build, chain, distribution, plain_rank, sampled, tree
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM, Qwen2ForCausalLM

from learners import language_model
from learners.attention import can_pack, use_complete_attention
from learners.deepspeed.reference import ReferencePolicy
from learners.language_model import LanguageModel
from learners.objective.whole_teacher import WholeTeacher
from rlsys.types import StageName, TrainingBatch

pytestmark = pytest.mark.usefixtures("process_group")

WHOLE: dict[str, Any] = {
    "policy": {"weight": 0.0},
    "distill": {"weight": 0.5, "divergence": "whole", "beta": 0.3, "on_policy_share": 0.25},
    "sft": {"source": "demonstrations"},
}
ROWS = ([5, 6, 7], [5, 6, 7, 8, 9])


def kl(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second)).sum(-1)


def divergences(module: nn.Module, teacher: nn.Module, tokens: list[int], start: int, beta: float) -> Tensor:
    """Return the divergence of every token from `start` on, by the published formula."""
    p, q = distribution(module, tokens)[start - 1 :], distribution(teacher, tokens)[start - 1 :].detach()
    q = q[:, : p.shape[-1]].log_softmax(-1)
    if beta == 1:
        return kl(p, q)
    mixture = (beta * q.exp() + (1 - beta) * p.exp()).log()
    return beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)


@pytest.mark.parametrize("stage", ["online", "sft"])
def test_a_step_goes_down_the_gradient_of_the_divergence(stage: StageName) -> None:
    groups = tuple(sampled(1)) if stage == "online" else ()
    rank = plain_rank(WHOLE, stage=stage)
    module, teacher = build(Qwen2ForCausalLM, 0), build(Qwen2ForCausalLM, 2)
    rows = torch.cat([divergences(module, teacher, tokens, 1, 0.3) for tokens in ROWS])
    loss = 0.75 * rows.mean()
    chains = [each.token_ids.tolist() for group in groups for each in group.trajectories]
    if chains:
        loss = loss + 0.25 * torch.cat([divergences(module, teacher, tokens, 2, 0.3) for tokens in chains]).mean()
    demonstrations = tuple(chain(tokens, 1) for tokens in ROWS)
    metrics = rank.train(TrainingBatch(groups=groups, demonstrations=demonstrations), 0, 1)
    assert metrics["objective/distill_loss"] == pytest.approx(loss.item(), rel=1e-6)
    if stage == "online":  # the stage sft has another term
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        moved = [p.detach() - RATE * 0.5 * g for p, g in zip(module.parameters(), gradients, strict=True)]
        expected = torch.cat([each.flatten() for each in moved])
        torch.testing.assert_close(rank.policy.vector(), expected, rtol=0, atol=1e-7)


TEACHERS = {
    "of the same kind": lambda: build(Qwen2ForCausalLM, 5),
    "with more token ids": lambda: build(Qwen2ForCausalLM, 5, vocab_size=70),
    "that cannot share rows": lambda: windowed_model(),
}


def windowed_model() -> nn.Module:
    """Build a model whose attention ends after three tokens, and knows no blocks."""
    torch.manual_seed(5)
    model = MistralForCausalLM(MistralConfig(**SIZE, sliding_window=3)).double()
    use_complete_attention(model)
    assert not can_pack(model)
    return model


@pytest.mark.parametrize("kind", TEACHERS)
def test_another_teacher_takes_the_place_of_the_first_policy(kind: str) -> None:
    rank, first = plain_rank(WHOLE, stage="sft"), plain_rank(WHOLE, stage="sft")
    module, teacher = build(Qwen2ForCausalLM, 0), TEACHERS[kind]()
    rank.teacher = ReferencePolicy(TEACHERS[kind](), rank.settings)
    rank.forward.describe(rank.policy.module, rank.teacher.module)
    loss = 0.75 * torch.cat([divergences(module, teacher, tokens, 1, 0.3) for tokens in ROWS]).mean()
    batch = TrainingBatch(demonstrations=tuple(chain(tokens, 1) for tokens in ROWS))
    metrics = rank.train(batch, 0, 1)
    assert metrics["objective/distill_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert metrics["objective/distill_loss"] != pytest.approx(first.train(batch, 0, 1)["objective/distill_loss"])


def test_half_precision_keeps_the_divergence() -> None:
    logits, states = torch.randn(3, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    whole = WholeTeacher(rows=torch.arange(3), states=states, output_layer=lambda x: x, beta=1.0, interpolation=1.0)
    found = whole.divergences(logits)
    assert found.dtype == torch.float32
    expected = kl(logits.double().log_softmax(-1), states.double().log_softmax(-1))
    torch.testing.assert_close(found[:, 0].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("interpolation", [1.0, 0.4])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9, 1.0])
def test_value_and_gradient_are_those_of_the_published_formula(beta: float, interpolation: float) -> None:
    torch.manual_seed(0)
    logits, states = torch.randn(3, 64, dtype=torch.float64, requires_grad=True), torch.randn(3, 64).double()
    whole = WholeTeacher(
        rows=torch.arange(3), states=states, output_layer=lambda x: x, beta=beta, interpolation=interpolation
    )
    p, q = logits.log_softmax(-1), states.log_softmax(-1)
    q = ((1 - interpolation) * p.detach() + interpolation * q).log_softmax(-1)
    mixture = (beta * q.exp() + (1 - beta) * p.exp()).log()
    limits = {0.0: kl(q, p), 1.0: kl(p, q)}
    expected = limits.get(beta, beta * kl(q, mixture) + (1 - beta) * kl(p, mixture))
    weights = torch.tensor([0.2, 0.5, 3.0], dtype=torch.float64)
    pair = whole.divergences(logits)[:, 0], expected
    torch.testing.assert_close(*pair, rtol=0, atol=1e-10)
    gradients = [torch.autograd.grad((weights * each).sum(), logits)[0] for each in pair]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [60, 64, 70])
def test_tokens_that_one_model_lacks_are_left_out(size: int) -> None:
    torch.manual_seed(0)
    logits, states = torch.randn(3, 64, dtype=torch.float64), torch.randn(3, size, dtype=torch.float64)
    whole = WholeTeacher(rows=torch.arange(3), states=states, output_layer=lambda x: x, beta=1.0, interpolation=1.0)
    shared = min(64, size)
    expected = kl(logits[:, :shared].log_softmax(-1), states[:, :shared].log_softmax(-1))
    torch.testing.assert_close(whole.divergences(logits)[:, 0], expected, rtol=0, atol=1e-12)


def test_there_is_no_divergence_from_itself_and_then_there_is() -> None:
    objective = {**WHOLE, "policy": {"weight": 1.0, "estimator": "dr_grpo"}}
    objective["distill"] = {"weight": 0.5, "divergence": "whole", "beta": 1.0}
    rank = plain_rank(objective)
    assert rank.reference is not None
    rank.reference.module.load_state_dict(rank.policy.module.state_dict())
    batch = TrainingBatch(groups=(*sampled(2), tree()))
    first, second = rank.train(batch, 0, 1), rank.train(batch, 1, 2)
    assert first["distill/divergence"] == pytest.approx(0, abs=1e-10)
    assert second["distill/divergence"] > 1e-6
    assert first["objective/distill_denominator"] == first["objective/policy_denominator"]


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_any_parts_give_the_same_values_and_gradients(parts: int) -> None:
    model, teacher = (LanguageModel(build(Qwen2ForCausalLM, seed)) for seed in (0, 2))
    tokens = [1, 2, 3, 4, 5, 6, 7]
    ids = torch.tensor([tokens])
    rows = torch.tensor([1, 3, 5])
    states = teacher.states(ids, rows, None, None).detach()
    largest: list[int] = []

    def output_layer(part: Tensor) -> Tensor:
        largest.append(len(part))
        return teacher.logits(part)

    whole = WholeTeacher(rows=rows, states=states, output_layer=output_layer, beta=1.0, interpolation=1.0)
    given = {"targets": torch.arange(6), "target_ids": ids[0, 1:], "temperature": torch.full((6,), 0.7)}
    found = model(input_ids=ids, parts=parts, others=whole, **given)[2]
    expected = divergences(model.module, teacher.module, tokens, 1, 1.0)[rows]
    torch.testing.assert_close(found[:, 0], expected, rtol=0, atol=1e-10)  # at temperature 1, whatever the sampler's
    pair = [torch.autograd.grad(each.sum(), model.module.parameters())[0] for each in (found, expected)]
    torch.testing.assert_close(*pair, rtol=0, atol=1e-9)
    assert max(largest) <= -(-6 // parts), "the teacher's logits exist for a part alone"


def test_small_chunks_give_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = []
    for chunk in (language_model.CHUNK_LOGITS, 128):
        monkeypatch.setattr("learners.forward.CHUNK_LOGITS", chunk)
        rank = plain_rank(WHOLE)
        rank.forward.describe(rank.policy.module)
        rank.train(TrainingBatch(groups=tuple(sampled(2)), demonstrations=(chain([5, 6, 7], 1),)), 0, 1)
        vectors.append(rank.policy.vector())
    torch.testing.assert_close(*vectors, rtol=0, atol=1e-9)
