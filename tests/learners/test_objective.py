"""Token weights by hand, and the whole chain: rows -> plan -> collate -> log-probabilities -> loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from learners.batching import Row, collate, plan_micro_batches
from learners.logprobs import masked_token_logprobs
from learners.losses import kl_loss, policy_loss
from learners.objective import token_weights

AGGREGATIONS = ["token_mean", "sequence_mean", "constant"]
TEMPERATURE = 0.7
VOCABULARY = 11


def weights_of(lengths: Sequence[int], aggregation: str, max_tokens: int = 10) -> list[float]:
    return token_weights(lengths, aggregation=aggregation, max_tokens=max_tokens).tolist()


def test_weights_by_hand():
    # 6 tokens in 3 rows of which 2 have any; max_tokens 10
    lengths = [2, 4, 0]
    assert weights_of(lengths, "token_mean") == [1 / 6] * 3
    assert weights_of(lengths, "sequence_mean")[:2] == [1 / (2 * 2), 1 / (2 * 4)]
    assert weights_of(lengths, "constant") == [1 / 30] * 3


def test_weights_are_the_published_aggregations():
    lengths, generator = [3, 1, 7], np.random.default_rng(0)
    losses = [generator.normal(size=length) for length in lengths]
    total = {
        name: sum(weight * loss.sum() for weight, loss in zip(weights_of(lengths, name), losses, strict=True))
        for name in AGGREGATIONS
    }
    assert total["token_mean"] == pytest.approx(np.concatenate(losses).mean(), rel=1e-12)
    assert total["sequence_mean"] == pytest.approx(np.mean([loss.mean() for loss in losses]), rel=1e-12)
    assert total["constant"] == pytest.approx(np.mean([loss.sum() / 10 for loss in losses]), rel=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_no_rows_and_no_tokens(aggregation):
    assert weights_of([], aggregation) == []
    assert np.isfinite(weights_of([0, 0], aggregation)).all()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="loss_aggregation"):
        weights_of([1], "mean")
    for lengths, max_tokens in (([-1], 10), ([1], 0)):
        with pytest.raises(ValueError, match="expected max_tokens"):
            weights_of(lengths, "constant", max_tokens)


class TinyCausalModel(nn.Module):
    """Embedding, running mean over the past, output layer: causal, and every weight matters."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        shape = (VOCABULARY, 6)
        self.embedding = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        self.output = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

    def forward(self, input_ids: Tensor) -> Tensor:
        counts = torch.arange(1, input_ids.shape[1] + 1).unsqueeze(-1)
        hidden = self.embedding[input_ids].cumsum(dim=1) / counts
        return torch.tanh(hidden) @ self.output.T


def make_rows(count: int) -> list[Row]:
    """Prompts of 1 to 4 tokens, completions of 1 to 12, one masked-out token inside each longer one."""
    generator = np.random.default_rng(5)
    rows = []
    for _ in range(count):
        prompt, completion = int(generator.integers(1, 5)), int(generator.integers(1, 13))
        mask = np.arange(prompt + completion) >= prompt
        if completion > 3:
            mask[prompt + 2] = False  # a forced token in the middle
        rows.append(
            Row(
                token_ids=generator.integers(0, VOCABULARY, prompt + completion).astype(np.int32),
                loss_mask=mask,
                behavior_logprobs=np.where(mask, -generator.uniform(1, 4, mask.shape), 0).astype(np.float32),
                advantages=np.full(mask.shape, generator.normal(), dtype=np.float32),
            )
        )
    return rows


def micro_batch_loss(model: nn.Module, rows: Sequence[Row], weights: Sequence[float], pad_id: int) -> Tensor:
    batch = collate(rows, pad_id)
    logits = model(batch.input_ids)[:, batch.first_target : -1]
    targets, mask = batch.input_ids[:, batch.first_target + 1 :], batch.loss_mask[:, batch.first_target :]
    logprobs, _ = masked_token_logprobs(logits, targets, mask, TEMPERATURE)
    old = batch.behavior_logprobs[batch.loss_mask].double()
    advantages = batch.advantages.double()
    per_token = torch.tensor([*weights, 0.0], dtype=torch.float64)[batch.row_ids]
    policy = policy_loss(logprobs, old, advantages, per_token, clip_low=0.2, clip_high=0.28).loss
    return policy + 0.1 * kl_loss(logprobs, old, per_token, estimator="k3").loss


def run_update(
    rows: Sequence[Row],
    plan: list[list[list[int]]],
    aggregation: str,
    *,
    pad_id: int = 0,
    local: bool = False,
) -> tuple[float, Tensor]:
    """Sum of losses and gradients over ranks and micro-batches. local: count within each micro-batch."""
    model, total = TinyCausalModel(), 0.0
    lengths = [row.loss_tokens for row in rows]
    weights = token_weights(lengths, aggregation=aggregation, max_tokens=12)
    batches = [batch for share in plan for batch in share]
    for batch in batches:
        chosen = weights[batch]
        if local:
            chosen = token_weights([lengths[row] for row in batch], aggregation=aggregation, max_tokens=12)
            chosen = chosen / len(batches)
        loss = micro_batch_loss(model, [rows[row] for row in batch], list(chosen), pad_id)
        loss.backward()
        total += loss.item()
    return total, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_ranks_and_accumulation_do_not_change_loss_or_gradient(aggregation):
    rows = make_rows(13)
    lengths = [row.length for row in rows]
    loss, gradient = run_update(rows, [[list(range(13))]], aggregation)
    assert gradient.abs().max() > 1e-3
    plans = [plan_micro_batches(lengths, ranks=r, budget_tokens=b) for r, b in ((1, 20), (2, 40), (3, 16), (20, 9))]
    plans.append([[[row] for row in range(13)], [[] for _ in range(13)]])
    for plan in plans:
        split_loss, split_gradient = run_update(rows, plan, aggregation)
        assert split_loss == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(split_gradient, gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_a_mean_of_local_means_would_change_the_loss(aggregation):
    # the mistake that global counts prevent: micro-batches of unequal size averaged as if they were equal
    rows, plan = make_rows(13), [[list(range(10))], [[10, 11, 12]]]
    loss, _ = run_update(rows, plan, aggregation)
    wrong, _ = run_update(rows, plan, aggregation, local=True)
    assert abs(wrong - loss) > 1e-3 * abs(loss)


def test_garbage_where_nothing_is_trained_changes_nothing():
    rows = make_rows(6)
    plan = [[[0, 1, 2], [3, 4, 5]]]
    loss, gradient = run_update(rows, plan, "token_mean")
    spoiled = []
    for row in rows:
        # behavior log-probs and advantages outside the mask, and tokens after the last trained one
        tail = replace(
            row,
            token_ids=np.append(row.token_ids, [9, 9, 9]).astype(np.int32),
            loss_mask=np.append(row.loss_mask, [False] * 3),
            behavior_logprobs=np.append(np.where(row.loss_mask, row.behavior_logprobs, np.nan), [np.nan] * 3),
            advantages=np.append(np.where(row.loss_mask, row.advantages, np.nan), [np.nan] * 3).astype(np.float32),
        )
        spoiled.append(tail)
    for changed, pad_id in ((spoiled, 0), (rows, 7)):
        found_loss, found_gradient = run_update(changed, plan, "token_mean", pad_id=pad_id)
        assert found_loss == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(found_gradient, gradient, rtol=1e-12, atol=1e-14)


def test_the_learner_recomputes_what_a_sampler_at_this_temperature_reported():
    """Sampled token by token at a temperature, then trained in one padded batch: every ratio is 1."""
    model, generator = TinyCausalModel(), torch.Generator().manual_seed(0)
    rows = []
    for prompt, completion in ((3, 5), (1, 9), (4, 2)):
        tokens = torch.randint(VOCABULARY, (prompt,), generator=generator).tolist()
        logprobs = [0.0] * prompt
        for _ in range(completion):
            with torch.no_grad():
                p = torch.softmax(model(torch.tensor([tokens]))[0, -1] / TEMPERATURE, dim=-1)
            tokens.append(int(torch.multinomial(p, 1, generator=generator)))
            logprobs.append(float(p[tokens[-1]].log()))
        rows.append(
            Row(
                token_ids=np.array(tokens, dtype=np.int32),
                loss_mask=np.arange(len(tokens)) >= prompt,
                behavior_logprobs=np.array(logprobs, dtype=np.float32),
                advantages=np.ones(len(tokens), dtype=np.float32),
            )
        )
    batch = collate(rows, pad_id=0)
    behavior = batch.behavior_logprobs[batch.loss_mask].double()
    with torch.no_grad():
        logits = model(batch.input_ids)[:, :-1]
        ours, _ = masked_token_logprobs(logits, batch.input_ids[:, 1:], batch.loss_mask, TEMPERATURE)
        forgotten, _ = masked_token_logprobs(logits, batch.input_ids[:, 1:], batch.loss_mask, 1.0)
    assert (ours - behavior).abs().max() < 1e-6  # behavior log-probs are stored in fp32
    assert (forgotten - behavior).abs().max() > 0.1
