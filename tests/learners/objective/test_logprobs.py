"""Log-probabilities of the learner: values, gradient, masking, and agreement with the sampler."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from learners.objective.logprobs import token_logprobs


def random_case(rows: int, columns: int, vocabulary: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(7)
    logits = 3 * torch.randn(rows, columns, vocabulary, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows, columns), generator=generator)
    mask = torch.rand(rows, columns, generator=generator) < 0.6
    return logits.to(dtype), targets, mask


def masked_token_logprobs(logits, targets, mask, temperature, *, entropy_at=None, entropy_gradient=False):
    """Return those of the unmasked positions. `entropy_at` has indices into them."""
    chosen, at = targets[mask], None
    if entropy_at is not None:
        at = torch.zeros(len(chosen), dtype=torch.bool)
        at[entropy_at] = True
    temperatures = torch.full((len(chosen),), temperature, dtype=torch.float64)
    found = token_logprobs(logits[mask], chosen, temperatures, entropy_at=at, entropy_gradient=entropy_gradient)
    return found[0], found[1]


def everywhere(mask: torch.Tensor) -> torch.Tensor:
    """Return the indices of all targets."""
    return torch.arange(int(mask.sum()))


def test_by_hand_at_temperature_one():
    # logits 0, ln 3: p = 1/4, 3/4; entropy = (1/4) ln 4 + (3/4) ln(4/3) = ln 4 - (3/4) ln 3
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, math.log(3)]]], dtype=torch.float64)
    mask = torch.ones(1, 2, dtype=torch.bool)
    logprobs, entropy = masked_token_logprobs(logits, torch.tensor([[0, 1]]), mask, 1.0, entropy_at=everywhere(mask))
    assert logprobs.tolist() == pytest.approx([-math.log(4), math.log(0.75)], rel=1e-12)
    assert entropy.tolist() == pytest.approx([math.log(4) - 0.75 * math.log(3)] * 2, rel=1e-12)


def test_by_hand_at_temperature_two():
    # logits / 2: 0, ln sqrt(3): p = 1 / (1 + sqrt(3)), sqrt(3) / (1 + sqrt(3)).
    # Times the temperature instead of divided by it: 1/10 and 9/10, far away.
    root = math.sqrt(3)
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, math.log(3)]]], dtype=torch.float64)
    mask = torch.ones(1, 2, dtype=torch.bool)
    logprobs, entropy = masked_token_logprobs(logits, torch.tensor([[0, 1]]), mask, 2.0, entropy_at=everywhere(mask))
    p, q = 1 / (1 + root), root / (1 + root)
    assert logprobs.tolist() == pytest.approx([math.log(p), math.log(q)], rel=1e-12)
    assert entropy.tolist() == pytest.approx([-p * math.log(p) - q * math.log(q)] * 2, rel=1e-12)


def test_order_is_row_major_and_only_masked_positions_come_back():
    logits, targets, mask = random_case(3, 5, 4)
    logprobs, entropy = masked_token_logprobs(logits, targets, mask, 0.7, entropy_at=everywhere(mask))
    expected, expected_entropy = [], []
    for row, column in np.argwhere(mask.numpy()):
        scaled = logits[row, column].numpy() / 0.7
        weights = np.exp(scaled - scaled.max())
        p = weights / weights.sum()
        expected.append(math.log(p[targets[row, column]]))
        expected_entropy.append(-(p * np.log(p)).sum())
    assert logprobs.tolist() == pytest.approx(expected, rel=1e-11)
    assert entropy.tolist() == pytest.approx(expected_entropy, rel=1e-11)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_gradient_closed_form(temperature):
    # d log p_y / d logit_v = (1[v = y] - p_v) / temperature; positions outside the mask get 0
    logits, targets, mask = random_case(2, 4, 5)
    logits.requires_grad_()
    logprobs, entropy = masked_token_logprobs(logits, targets, mask, temperature, entropy_at=everywhere(mask))
    logprobs.sum().backward()
    p = torch.softmax(logits.detach() / temperature, dim=-1)
    one_hot = torch.nn.functional.one_hot(targets, 5)
    expected = mask.unsqueeze(-1) * (one_hot - p) / temperature
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-15)
    assert not entropy.requires_grad


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_entropy_gradient_closed_form(temperature):
    # H = -sum_u p_u log p_u and d p_u / d logit_v = p_u (1[u = v] - p_v) / temperature, so
    # d H / d logit_v = -p_v (log p_v + H) / temperature; positions outside the mask get 0
    logits, targets, mask = random_case(2, 4, 5)
    logits.requires_grad_()
    _, entropy = masked_token_logprobs(
        logits, targets, mask, temperature, entropy_at=everywhere(mask), entropy_gradient=True
    )
    entropy.sum().backward()
    logp = torch.log_softmax(logits.detach() / temperature, dim=-1)
    expected = -(logp.exp() * logp).sum(dim=-1)
    torch.testing.assert_close(entropy.detach(), expected[mask], rtol=1e-12, atol=1e-15)
    gradient = -logp.exp() * (logp + expected.unsqueeze(-1)) / temperature * mask.unsqueeze(-1)
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-11, atol=1e-15)
    assert gradient[mask].abs().max() > 0.1


def test_garbage_outside_the_mask_changes_nothing():
    logits, targets, mask = random_case(3, 5, 4)
    spoiled = logits.masked_fill(~mask.unsqueeze(-1), math.nan).requires_grad_()
    clean = logits.requires_grad_()
    results = [masked_token_logprobs(x, targets, mask, 0.7, entropy_at=everywhere(mask)) for x in (clean, spoiled)]
    for logprobs, _ in results:
        logprobs.sum().backward()
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(clean.grad, spoiled.grad)


def test_half_precision_logits_are_raised_before_the_division():
    logits, targets, mask = random_case(4, 6, 50, torch.bfloat16)
    logprobs, entropy = masked_token_logprobs(logits, targets, mask, 0.7, entropy_at=everywhere(mask))
    expected, expected_entropy = masked_token_logprobs(logits.float(), targets, mask, 0.7, entropy_at=everywhere(mask))
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert torch.equal(logprobs, expected)
    assert torch.equal(entropy, expected_entropy)
    late = torch.log_softmax((logits / 0.7).float(), dim=-1)[mask]  # what dividing in bf16 would give
    assert (late.gather(-1, targets[mask].unsqueeze(-1)).squeeze(-1) - expected).abs().max() > 1e-3


def test_entropy_of_some_positions_and_of_none():
    logits, targets, mask = random_case(3, 5, 4)
    logits.requires_grad_()
    logprobs, every = masked_token_logprobs(logits, targets, mask, 0.7, entropy_at=everywhere(mask))
    at = torch.tensor([0, 2, 5])
    for gradient in (False, True):
        same, some = masked_token_logprobs(logits, targets, mask, 0.7, entropy_at=at, entropy_gradient=gradient)
        assert torch.equal(same, logprobs)
        torch.testing.assert_close(some.detach(), every[at], rtol=1e-12, atol=0)
    # Only the chosen positions are trained.
    some.sum().backward()
    trained = logits.grad[mask].abs().sum(dim=-1) > 0
    assert trained.nonzero().flatten().tolist() == at.tolist()
    for nothing in (None, at[:0]):
        same, none = masked_token_logprobs(logits, targets, mask, 0.7, entropy_at=nothing)
        assert torch.equal(same, logprobs) and none.shape == (0,)


def test_impossible_tokens_leave_the_entropy_finite():
    logits = torch.tensor([[[0.0, 0.0, -math.inf]]])
    mask = torch.ones(1, 1, dtype=torch.bool)
    _, entropy = masked_token_logprobs(logits, torch.tensor([[0]]), mask, 1.0, entropy_at=everywhere(mask))
    assert entropy.item() == pytest.approx(math.log(2), rel=1e-6)  # fp32


def test_nothing_selected_still_has_a_gradient():
    logits, targets, mask = random_case(2, 3, 4)
    logits.requires_grad_()
    mask = torch.zeros_like(mask)
    logprobs, entropy = masked_token_logprobs(logits, targets, mask, 0.7, entropy_at=everywhere(mask))
    logprobs.sum().backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_bad_input_is_refused():
    logits, targets, mask = random_case(2, 3, 4)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"sampling\.temperature > 0"):
            masked_token_logprobs(logits, targets, mask, temperature)
    with pytest.raises(ValueError, match=r"\[N, V\]"):
        token_logprobs(logits[0], targets[0, 1:], torch.ones(2))


@pytest.mark.integration
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_the_sampler_of_the_engine(temperature, dtype):
    """The engine's own code for processed log-probabilities gives the same values for the same logits."""
    sampler = pytest.importorskip("vllm.v1.sample.sampler").Sampler
    logits, targets, mask = random_case(4, 6, 80, dtype)
    ours, _ = masked_token_logprobs(logits, targets, mask, temperature)
    raised = logits[mask].to(torch.float32)
    scaled = sampler.apply_temperature(raised.clone(), torch.full((len(raised),), temperature), all_random=True)
    theirs = sampler.compute_logprobs(scaled).gather(-1, targets[mask].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)  # fp32, |log p| up to 30
    if temperature != 1:
        raw = sampler.compute_logprobs(raised).gather(-1, targets[mask].unsqueeze(-1)).squeeze(-1)
        assert (ours - raw).abs().max() > 0.5  # without the temperature the comparison would fail
