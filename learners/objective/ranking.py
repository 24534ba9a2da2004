"""Ranking of the right and wrong answers of a prompt, with a constraint on the wrong ones."""

from __future__ import annotations

import torch
from torch import Tensor

from learners.objective.losses import LossOutput


def ranking_loss(scores: Tensor, is_right: Tensor, prompts: Tensor, weights: Tensor) -> LossOutput:
    """Compute the alignment loss with detached negatives.

    l_r  = log(1 + sum_p sum_n exp(sg[s_n] - s_p))        p: right answers of prompt r, n: its wrong answers
    loss = sum_r w_r l_r

    d loss / d s_p = -w_r sigmoid(log sum_n exp(s_n) + log sum_p exp(-s_p)) softmax_p(-s_p), and 0 for s_n: the
    constraint is that wrong answers, which are often mostly right, are never made less probable by themselves.
    `accuracy` is the share of the pairs (p, n) of a prompt with s_p > s_n, summed over the prompts.

    Args:
        scores: [S] nats, mean log-probability of the tokens of each answer; carries gradient.
        is_right: [S] bool. Every prompt has a right answer and a wrong one.
        prompts: [S] int64, number of the prompt of each answer, ascending, from 0 to R - 1.
        weights: [R], 1 / denominator of each prompt.

    Source: Alignment Fine-Tuning (AFT), arXiv:2309.02144, the detached constraint of sec. 4.
    """
    loss, accuracy = scores.sum() * 0, scores.new_zeros(())
    for prompt in range(len(weights)):
        own = prompts == prompt
        right, wrong = scores[own & is_right], scores[own & ~is_right].detach()
        # The double sum is the product of two sums.
        total = torch.logsumexp(wrong, dim=0) + torch.logsumexp(-right, dim=0)
        loss = loss + weights[prompt] * torch.nn.functional.softplus(total)
        accuracy += (right.detach()[:, None] > wrong).to(scores.dtype).mean()
    return LossOutput(loss, {"accuracy": accuracy})
